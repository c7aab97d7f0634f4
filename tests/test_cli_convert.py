import equinox as eqx
import jax.numpy as jnp
import pytest
from fixtures.checkpoint import random_model, tiny as tiny_config, write_gguf
from fixtures.cli import assert_refused, run, save_tiny_model
from fixtures.text import tiny as vocabularies

import mistral_eqx as mx


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def test_there_and_back_is_the_same_model(tiny, tmp_path):
    result = run("convert", tiny, tmp_path / "mistral", "--format", "mistral")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "Wrote " in result.stderr
    assert (tmp_path / "mistral" / "params.json").exists()
    assert run("convert", tmp_path / "mistral", tmp_path / "hf").exit_code == 0
    assert (tmp_path / "hf" / "config.json").exists()
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    assert eqx.tree_equal(mx.load(tiny), mx.load(tmp_path / "mistral"), mx.load(tmp_path / "hf"))


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.slow
def test_what_comes_out_of_a_gguf_generates_the_same_text(getkey, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("mistral_eqx.cli.loading._keep_compiled_programs", lambda: None)
    metadata = getattr(vocabularies, f"{kind}_metadata")(chat_template=vocabularies.CHATML)
    model = random_model(tiny_config(vocab=len(metadata["tokens"])), getkey())
    source = write_gguf(tmp_path / "model.gguf", model, vocabulary=metadata)
    result = run("convert", source, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Wrote {tmp_path / 'out'} (")
    for command in (["generate", "hello the 12"], ["chat"]):
        texts = [
            run(*command, "--model", model, "-n", 12, input="hello\n").stdout for model in (source, tmp_path / "out")
        ]
        assert texts[0] == texts[1]
        assert len(texts[0]) > 1


def test_a_vocabulary_that_cannot_be_read_may_be_left_out(getkey, tmp_path):
    metadata = vocabularies.byte_level_metadata(pre="chameleon")
    model = random_model(tiny_config(vocab=len(metadata["tokens"])), getkey())
    source = write_gguf(tmp_path / "model.gguf", model, vocabulary=metadata)
    assert_refused(run("convert", source, tmp_path / "out"), "'chameleon'", "leave the tokenizer out (--no-tokenizer).")
    assert not (tmp_path / "out").exists()
    assert run("convert", source, tmp_path / "out", "--no-tokenizer").exit_code == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_dtype_and_shard_size_are_kept(tiny, tmp_path):
    assert run("convert", tiny, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "10KB").exit_code == 0
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert mx.load(tmp_path / "out").dtype == "bfloat16"


def test_a_checkpoint_is_replaced_only_on_request(tiny, tmp_path):
    run("convert", tiny, tmp_path / "out")
    assert_refused(run("convert", tiny, tmp_path / "out"), str(tmp_path / "out"), "--overwrite")
    assert run("convert", tiny, tmp_path / "out", "--overwrite").exit_code == 0


def test_weights_that_are_not_finite_are_written_only_on_request(tiny, tmp_path):
    model = mx.load(tiny)
    broken = eqx.tree_at(lambda model: model.norm.weight, model, model.norm.weight.at[3].set(float("nan")))
    mx.save(broken, tmp_path / "broken", allow_nonfinite=True)
    words = ("'model.norm.weight'", str(tmp_path / "broken"), "as it is (--allow-nonfinite).")
    assert_refused(run("convert", tmp_path / "broken", tmp_path / "out"), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    assert run("convert", tmp_path / "broken", tmp_path / "out", "--allow-nonfinite").exit_code == 0
    assert jnp.isnan(mx.load(tmp_path / "out").norm.weight).tolist() == [at == 3 for at in range(16)]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["absent.gguf", "{out}"], "absent.gguf"),
        (["{tiny}", "{out}", "--format", "onnx"], "--format"),
        (["{tiny}", "{out}", "--max-shard-size", "much"], "much"),
        (["{tiny}"], "Missing argument"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tiny, tmp_path, arguments, word):
    places = {"tiny": tiny, "out": tmp_path / "out"}
    assert_refused(run("convert", *(argument.format(**places) for argument in arguments)), word)
    assert not (tmp_path / "out").exists()
