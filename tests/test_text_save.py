"""Tokenizers that were written and read again are the same."""

import json
import shutil

import pytest
from fixtures.text import templates, tiny
from hypothesis import given, settings, strategies as st

from mistral_eqx.text import HuggingFaceTokenizer, SentencePieceTokenizer, encode_chat, load_tokenizer


TEXTS = [
    *tiny.TEXTS,
    " ",
    "a",
    "\n",
    "hello  the t\u2581t <|im_end|> [INST] </s> [PAD7] \u00e9\u00e9t",
    "  [REF]a",
    " " * 40,
]


def gguf(folder, metadata):
    return load_tokenizer(tiny.write_gguf(folder / "tiny.gguf", **metadata))


def listing(folder):
    return sorted(file.name for file in folder.iterdir())


def assert_same(first, second):
    """Checks what a program can see of two tokenizers."""
    attributes = ("vocab", "bos_id", "eos_ids", "adds_bos", "chat_template", "tool_template", "control_tokens")
    for attribute in attributes:
        assert getattr(first, attribute) == getattr(second, attribute), attribute
    for text in TEXTS:
        for parse_special in (False, True):
            ids = first.encode(text, parse_special=parse_special)
            assert ids == second.encode(text, parse_special=parse_special), text
        assert first.decode(ids) == second.decode(ids)
        assert first.decode(ids, skip_special=False) == second.decode(ids, skip_special=False)
    if first.chat_template is not None:
        for conversation in templates.CONVERSATIONS:
            assert encode_chat(first, conversation) == encode_chat(second, conversation)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_bos_token": True, "chat_template": None},
        {"add_bos_token": None, "pre": "llama-bpe", "eot_token_id": 0},
        {"pre": "qwen2", "bos_token_id": None, "tool_template": templates.HERMES},
        {"pre": "default", "eos_token_id": None},
        {"add_space_prefix": True, "chat_template": templates.MISTRAL_3},
        {"add_space_prefix": True, "pre": "qwen2"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_a_byte_level_vocabulary_comes_back(tmp_path, changes):
    tokenizer = gguf(tmp_path, tiny.byte_level_metadata(**changes))
    tokenizer.save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert isinstance(again, HuggingFaceTokenizer)
    assert_same(tokenizer, again)
    several = {"generation_config.json"} if "eot_token_id" in changes else set()
    assert set(listing(tmp_path / "out")) == {"tokenizer.json", "tokenizer_config.json"} | several
    again.save(tmp_path / "third")
    for name in listing(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "third" / name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_space_prefix": False, "chat_template": tiny.CHATML},
        {"add_bos_token": False, "bos_token_id": 3, "eos_token_id": 260, "eot_token_id": 2},
        {"chat_template": templates.MISTRAL_3, "eom_token_id": 3, "tool_template": templates.HERMES},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_a_sentencepiece_vocabulary_comes_back(tmp_path, changes):
    tokenizer = gguf(tmp_path, tiny.sentencepiece_metadata(**changes))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    tokenizer.save(tmp_path / "out")
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"} <= set(listing(tmp_path / "out"))
    again = load_tokenizer(tmp_path / "out")
    assert isinstance(again, HuggingFaceTokenizer)
    assert_same(tokenizer, again)
    # The other file says the same.
    (tmp_path / "out" / "tokenizer.json").unlink()
    again = load_tokenizer(tmp_path / "out")
    assert isinstance(again, SentencePieceTokenizer)
    assert_same(tokenizer, again)


def test_trap_the_space_in_front_of_a_space(tmp_path):
    """What `tokenizers` does by itself, sentencepiece does not: to spare the space where there is one."""
    tokenizer = gguf(tmp_path, tiny.sentencepiece_metadata())
    tokenizer.save(tmp_path / "out")
    pieces = [piece for piece, _, _ in tiny.PIECES]
    ids = load_tokenizer(tmp_path / "out").encode(" a", add_bos=False)
    assert [pieces[id] for id in ids] == ["\u2581\u2581", "a"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    tokenizer = gguf(folder, tiny.sentencepiece_metadata())
    tokenizer.save(folder / "out")
    return tokenizer, load_tokenizer(folder / "out")


@settings(deadline=None, max_examples=300)
@given(text=st.text(alphabet=st.sampled_from("helot \u2581\u00e9\u5929\n<s>[INST]REF\U0001f642"), max_size=40))
def test_merges_give_the_ids_of_the_scores(both, text):
    original, saved = both
    ids = original.encode(text, parse_special=True)
    assert saved.decode(ids) == original.decode(ids)
    if not text.startswith("[REF]"):
        assert saved.encode(text, parse_special=True) == ids


@pytest.mark.parametrize("changes", [{"remove_extra_whitespaces": True}, {"tokens": "without bytes"}], ids=str)
def test_a_vocabulary_that_merges_cannot_express_is_one_file(tmp_path, changes):
    if "tokens" in changes:
        kept = [piece for piece in tiny.PIECES if piece[2] != tiny.BYTE]
        tokens, scores, types = map(list, zip(*kept, strict=True))
        changes = {"tokens": tokens, "scores": scores, "token_type": types}
    tokenizer = gguf(tmp_path, tiny.sentencepiece_metadata(**changes))
    tokenizer.save(tmp_path / "out")
    assert listing(tmp_path / "out") == ["tokenizer.model", "tokenizer_config.json"]
    assert_same(tokenizer, load_tokenizer(tmp_path / "out"))


def test_other_programs_are_told_what_starts_a_text(tmp_path):
    gguf(tmp_path, tiny.byte_level_metadata(add_bos_token=True)).save(tmp_path / "out")
    from tokenizers import Tokenizer

    reference = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert reference.encode("a").ids == load_tokenizer(tmp_path / "out").encode("a")
    assert reference.encode("a", "b").tokens == ["<|im_start|>", "a", "<|im_start|>", "b"]
    configuration = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert configuration == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": tiny.CHATML,
    }


def test_a_folder_with_a_tokenizer_is_left_alone(tmp_path):
    tokenizer = gguf(tmp_path, tiny.byte_level_metadata(eot_token_id=0))
    for name in ("tokenizer.model.v3", "chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("{}")
        (folder / "config.json").write_text("{}")
        with pytest.raises(ValueError, match=rf"The folder '.*' already holds '{name}'; remove it, or give another"):
            tokenizer.save(folder)
        assert listing(folder) == sorted([name, "config.json"])
    # With one token at the end of a text, the model's own file of that name stays.
    (tmp_path / "plain").mkdir()
    gguf(tmp_path, tiny.byte_level_metadata()).save(tmp_path / "generation_config_json")
    assert (tmp_path / "generation_config_json" / "generation_config.json").read_text() == "{}"


def test_nothing_is_half_written_after_an_error(tmp_path, monkeypatch):
    tokenizer = gguf(tmp_path, tiny.byte_level_metadata())
    monkeypatch.setattr(tokenizer, "chat_template", object())
    with pytest.raises(TypeError):
        tokenizer.save(tmp_path / "out")
    assert listing(tmp_path / "out") == []


@pytest.fixture(scope="module")
def data():
    return pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer._data_path()


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("tokenizer.model.v1", "tokenizer.model.v1"),
        ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v3"),
        pytest.param("tekken_240718.json", "tekken.json", marks=pytest.mark.slow),
    ],
)
def test_release_files_are_copied_with_their_settings(tmp_path, data, name, saved):
    tokenizer = load_tokenizer(data / name)
    tokenizer.save(tmp_path / "out")
    assert listing(tmp_path / "out") == sorted([saved, "tokenizer_config.json"])
    assert (tmp_path / "out" / saved).read_bytes() == (data / name).read_bytes()
    again = load_tokenizer(tmp_path / "out")
    assert type(again) is type(tokenizer)
    assert_same(tokenizer, again)
    # The format of conversations depends on the file's version.
    conversation = [{"role": "user", "content": "[INST] hi"}]
    assert encode_chat(again, conversation) == encode_chat(tokenizer, conversation)
    shutil.copy(data / name, tmp_path / saved)
    tiny.write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False, "chat_template": tiny.CHATML})
    tiny.write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 4]})
    tokenizer = load_tokenizer(tmp_path / saved)
    tokenizer.save(tmp_path / "changed")
    assert_same(tokenizer, load_tokenizer(tmp_path / "changed"))
