import shutil

import pytest
from fixtures.text import tiny

from mistral_eqx.text import SentencePieceTokenizer, load_tokenizer
from mistral_eqx.text.sentencepiece_model import write_model


RELEASED = [
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
]


@pytest.fixture(scope="module")
def data():
    return pytest.importorskip("mistral_common.tokens.tokenizers.mistral").MistralTokenizer._data_path()


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_give_the_ids_of_mistral_common(data, name):
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer as Reference

    tokenizer, reference = load_tokenizer(data / name), Reference(data / name)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.vocab, tokenizer.bos_id, tokenizer.eos_ids) == (reference.n_words, 1, (2,))
    assert tokenizer.special_ids == reference.special_ids
    for text in tiny.TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, bos=True, eos=False)
        assert tokenizer.encode(text, add_bos=False) == ids[1:]
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_control_tokens_are_tokens_from_version_3_on(data):
    text = "[INST] Hello[/INST]"
    first, third = (load_tokenizer(data / RELEASED[n]) for n in (0, 2))
    assert 3 not in first.encode(text, parse_special=True)
    # What follows a control token gets no space in front: the text has the one that belongs there.
    assert third.encode(text, parse_special=True) == [1, 3, *third.encode("Hello", add_bos=False), 4]
    assert not set(third.encode(text)[1:]) & third.special_ids


def test_an_unknown_token_is_decoded_as_sentencepiece_does(data):
    tokenizer = load_tokenizer(data / RELEASED[0])
    assert tokenizer.decode([0]) == " \u2047 "


def test_settings_beside_the_file(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.adds_bos, tokenizer.chat_template) == (True, None)
    tiny.write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False, "chat_template": "{{ 1 }}"})
    tiny.write_json(tmp_path / "generation_config.json", {"eos_token_id": [3, 2]})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.adds_bos, tokenizer.chat_template, tokenizer.eos_ids) == (False, "{{ 1 }}", (2, 3))
    tiny.write_json(tmp_path / "special_tokens_map.json", {"bos_token": {"content": "[INST]"}, "eos_token": "[REF]"})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (3, (260, 2, 3))


def test_tokens_that_only_the_settings_have_are_added(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    vocab = len(tiny.PIECES)
    tiny.write_json(tmp_path / "added_tokens.json", {"<end>": vocab + 1, "<extra>": vocab, "</s>": 2})
    tiny.write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<end>"})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab, tokenizer.eos_ids) == (vocab + 2, (vocab + 1, 2))
    (a,) = tokenizer._processor_without_prefix.encode("a")
    ids = tokenizer.encode("<s><extra>a<end>", add_bos=False, parse_special=True)
    assert ids == [1, vocab, a, vocab + 1]
    assert vocab + 1 not in tokenizer.encode("a<end>")
    assert tokenizer.decode(ids) == "<extra>a"
    tokenizer.save(tmp_path / "out")
    again = load_tokenizer(tmp_path / "out")
    assert again.encode("<s><extra>a<end>", add_bos=False, parse_special=True) == ids


@pytest.mark.parametrize("added", [{"<far>": len(tiny.PIECES) + 1}, {"</s>": 3}, {"</s>": len(tiny.PIECES)}])
def test_added_tokens_that_do_not_fit_are_refused(tmp_path, added):
    (tmp_path / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    tiny.write_json(tmp_path / "added_tokens.json", added)
    with pytest.raises(ValueError, match=r"give the token '.*' the id \d+, and tokenizer\.model does not; use a"):
        load_tokenizer(tmp_path)


def test_an_end_token_of_the_vocabulary_s_own_is_no_text(tmp_path):
    """Of the type that is always found in a text (user defined)."""
    (tmp_path / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    tiny.write_json(tmp_path / "tokenizer_config.json", {"eos_token": "[REF]"})
    tokenizer = load_tokenizer(tmp_path)
    assert 260 not in tokenizer.encode("hello [REF][REF] the")
    assert tokenizer.encode("[REF]", parse_special=True) == [1, 260]
    assert tokenizer.decode([1, 260]) == ""
    assert tokenizer.decode(tokenizer.encode("hello [REF][REF] the")) == "hello [REF][REF] the"


def test_a_named_token_that_the_file_does_not_have_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    tiny.write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    with pytest.raises(
        ValueError, match=r"tokenizer\.model name the token '<\|im_end\|>', which it does not have; use a"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("part", [0.3, 0.999])
def test_a_cut_file_is_refused(tmp_path, data, part):
    content = (data / RELEASED[0]).read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model, or it is damaged"):
        load_tokenizer(tmp_path)


def test_a_versioned_name_wins(tmp_path, data):
    shutil.copy(data / RELEASED[0], tmp_path / "tokenizer.model")
    shutil.copy(data / RELEASED[2], tmp_path / "tokenizer.model.v3")
    assert load_tokenizer(tmp_path).vocab == 32768


def changed(at, piece):
    """The pieces with another one in a place."""
    return [*tiny.PIECES[:at], piece, *tiny.PIECES[at + 1 :]]


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (changed(4, ("<0xZZ>", 0.0, tiny.BYTE)), "its byte token 4 has the text '<0xZZ>'"),
        (changed(270, ("x", float("nan"), tiny.NORMAL)), "the score nan"),
        (changed(270, ("x", 0.0, 99)), "the type 99"),
        (changed(270, ("x\0", 0.0, tiny.NORMAL)), "the character NUL"),
        (changed(270, ("x" * 5000, 0.0, tiny.NORMAL)), "5000 characters"),
        (tiny.PIECES[1:], "0 tokens for unknown words"),
        ([tiny.PIECES[0], *((text, score, tiny.CONTROL) for text, score, _ in tiny.PIECES[1:])], "none of its tokens"),
        ([], "0 tokens for unknown words"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tokens_that_cannot_be_are_refused(tmp_path, pieces, words):
    model = write_model(pieces, add_dummy_prefix=True, remove_extra_whitespaces=False, precompiled_charsmap=b"")
    (tmp_path / "tokenizer.model").write_bytes(model + b"\x12\x00")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model, or it is damaged") as caught:
        load_tokenizer(tmp_path)
    assert words in str(caught.value)
