import equinox as eqx
import pytest
from cli_fixtures import assert_refused, run, save_tiny_model

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


def test_dtype_and_shard_size_are_kept(tiny, tmp_path):
    assert run("convert", tiny, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "10KB").exit_code == 0
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert mx.load(tmp_path / "out").dtype == "bfloat16"


def test_a_checkpoint_is_replaced_only_on_request(tiny, tmp_path):
    run("convert", tiny, tmp_path / "out")
    assert_refused(run("convert", tiny, tmp_path / "out"), str(tmp_path / "out"), "--overwrite")
    assert run("convert", tiny, tmp_path / "out", "--overwrite").exit_code == 0


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
