import jax.numpy as jnp
import pytest
from fixtures.checkpoint import assert_same_weights, random_model, tiny as tiny_config, write_gguf
from fixtures.text import tiny

import mistral_eqx as mx


KINDS = {"gpt2": tiny.byte_level_metadata, "llama": tiny.sentencepiece_metadata}


def listing(folder):
    return sorted(file.name for file in folder.iterdir())


def gguf(folder, key, kind="gpt2", **changes):
    """A random model with a vocabulary, in one file."""
    vocabulary = KINDS[kind](**changes)
    config = tiny_config(vocab=len(vocabulary["tokens"]))
    return write_gguf(folder / f"{kind}.gguf", random_model(config, key), vocabulary=vocabulary)


@pytest.mark.parametrize("format", ["hf", "mistral"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_the_vocabulary_of_a_gguf_goes_along(getkey, tmp_path, kind, format):
    path = gguf(tmp_path, getkey(), kind, chat_template=tiny.CHATML, eot_token_id=0)
    mx.convert(path, tmp_path / "out", format=format, dtype="bfloat16")
    assert_same_weights(mx.load(tmp_path / "out"), mx.load(path, dtype="bfloat16"))
    before, after = mx.load_tokenizer(path), mx.load_tokenizer(tmp_path / "out")
    assert (after.bos_id, after.eos_ids) == (before.bos_id, before.eos_ids) == (1, (2, 0))
    assert after.adds_bos == before.adds_bos
    conversation = [{"role": "user", "content": "hello <|im_end|> é"}]
    assert mx.encode_chat(after, conversation) == mx.encode_chat(before, conversation)
    for text in tiny.TEXTS:
        assert after.encode(text) == before.encode(text)
    # And from there on, as files.
    mx.convert(tmp_path / "out", tmp_path / "again", format="hf")
    assert mx.load_tokenizer(tmp_path / "again").encode("hello") == before.encode("hello")


def test_a_folder_around_a_gguf_is_converted_with_its_tokenizer(getkey, tmp_path):
    (tmp_path / "folder").mkdir()
    path = gguf(tmp_path / "folder", getkey())
    mx.convert(tmp_path / "folder", tmp_path / "inside", format="hf")
    assert mx.load_tokenizer(tmp_path / "inside").encode("hello 12") == mx.load_tokenizer(path).encode("hello 12")
    # Files beside it come first, as they do for `load_tokenizer`.
    (tmp_path / "folder" / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    mx.convert(tmp_path / "folder", tmp_path / "beside", format="hf")
    assert listing(tmp_path / "beside") == ["config.json", "model.safetensors", "tokenizer.model"]


def test_files_of_the_tokenizer_are_copied_and_no_others(getkey, tmp_path):
    mx.save(random_model(tiny_config(), getkey()), tmp_path / "hf")
    names = ["tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "generation_config.json"]
    (tmp_path / "hf" / "additional_chat_templates").mkdir()
    (tmp_path / "hf" / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    for name in (*names, "README.md", "secret.txt"):
        (tmp_path / "hf" / name).write_text(name)
    mx.convert(tmp_path / "hf", tmp_path / "out", format="mistral")
    folders = ["additional_chat_templates"]
    assert listing(tmp_path / "out") == sorted([*names, *folders, "params.json", "consolidated.safetensors"])
    assert listing(tmp_path / "out" / "additional_chat_templates") == ["tool_use.jinja"]
    assert (tmp_path / "out" / "tekken.json").read_text() == "tekken.json"
    mx.convert(tmp_path / "hf", tmp_path / "bare", format="mistral", tokenizer=False)
    assert listing(tmp_path / "bare") == ["consolidated.safetensors", "params.json"]


@pytest.mark.parametrize("model", [None, "none", "no_vocab"])
def test_a_gguf_without_a_vocabulary_is_only_weights(getkey, tmp_path, model):
    path = gguf(tmp_path, getkey(), model=model)
    mx.convert(path, tmp_path / "out", format="hf")
    assert listing(tmp_path / "out") == ["config.json", "model.safetensors"]


def test_a_vocabulary_that_cannot_be_read_is_refused_before_anything_is_written(getkey, tmp_path):
    path = gguf(tmp_path, getkey(), pre="chameleon")
    with pytest.raises(
        ValueError, match=r"'chameleon' .*tokenizer\.json, or leave the tokenizer out \(tokenizer=False\)\."
    ):
        mx.convert(path, tmp_path / "out", format="hf", progress=pytest.fail)
    assert listing(tmp_path) == ["gpt2.gguf"]
    mx.convert(path, tmp_path / "out", format="hf", tokenizer=False)
    assert listing(tmp_path / "out") == ["config.json", "model.safetensors"]


def test_nothing_is_half_written_if_the_tokenizer_fails(getkey, tmp_path, monkeypatch):
    path = gguf(tmp_path, getkey())
    mx.convert(path, tmp_path / "out", format="hf")

    def fail(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mistral_eqx.text.tokenizer.write_settings", fail)
    for target in ("new", "out"):
        with pytest.raises(KeyboardInterrupt):
            mx.convert(path, tmp_path / target, format="mistral", overwrite=True)
    assert listing(tmp_path) == ["gpt2.gguf", "out"]
    assert listing(tmp_path / "out") == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.slow
def test_a_model_and_its_tokenizer_are_saved_into_one_folder(getkey, tmp_path):
    path = gguf(tmp_path, getkey())
    model, tokenizer = mx.load(path), mx.load_tokenizer(path)
    mx.save(model, tmp_path / "out")
    tokenizer.save(tmp_path / "out")
    ids = [tokenizer.encode("hello")]
    again, after = mx.load(tmp_path / "out"), mx.load_tokenizer(tmp_path / "out")
    assert [after.encode("hello")] == ids
    tokens = mx.generate(model, ids, max_new_tokens=4).tokens
    assert jnp.array_equal(mx.generate(again, ids, max_new_tokens=4).tokens, tokens)
