import os

import pytest
from fixtures.text import tiny

from mistral_eqx.text import AbstractTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer


def test_a_folder_offers_what_is_first_in_the_order(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    tiny.byte_level_json(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)


def test_a_path_may_be_text(tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", **tiny.byte_level_metadata())
    tokenizer = load_tokenizer(os.fspath(path))
    assert isinstance(tokenizer, AbstractTokenizer)
    assert tokenizer.name == str(path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file, folder or preset '.*nowhere'; give "):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"The folder .* has no tokenizer; add a tokenizer\.json, a tekken\.json"):
        load_tokenizer(tmp_path)


def test_what_is_not_known(tmp_path):
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(
        ValueError, match=r"vocab\.txt does not have the name of a tokenizer file; give a tokenizer\.json"
    ):
        load_tokenizer(tmp_path / "vocab.txt")


@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json", "tokenizer.model", "tokenizer.model.v3", "a.gguf"])
def test_what_is_empty(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name} is empty; fetch it again\."):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer.model.v3"])
def test_what_is_too_large_is_not_read(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(2**33)
    with pytest.raises(
        ValueError, match=rf"{name}' is larger than 64 MB, the limit for a file of its kind; fetch it again"
    ):
        load_tokenizer(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
