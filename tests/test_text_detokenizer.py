import pytest
from fixtures.text import tiny
from hypothesis import given, settings, strategies as st

from mistral_eqx.text import Detokenizer, SentencePieceTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.byte_level_json(folder / "byte_level")
    tiny.metaspace_json(folder / "metaspace")
    return [
        load_tokenizer(tiny.write_gguf(folder / "tiny.gguf", **tiny.byte_level_metadata())),
        load_tokenizer(folder / "byte_level"),
        load_tokenizer(folder / "metaspace"),
        SentencePieceTokenizer(tiny.sentencepiece_model(), name="tiny.model"),
        SentencePieceTokenizer(tiny.sentencepiece_model(add_dummy_prefix=False), name="tiny.model"),
    ]


def streamed(tokenizer, ids, **options):
    detokenizer = Detokenizer(tokenizer, **options)
    pushed = [detokenizer.push(id) for id in ids]
    return pushed, detokenizer.flush()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_add_up_to_the_decoded_text_for_any_ids(tokenizers, data):
    tokenizer = data.draw(st.sampled_from(tokenizers), label="tokenizer")
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab - 1)), label="ids")
    skip_special = data.draw(st.booleans(), label="skip_special")
    pushed, rest = streamed(tokenizer, ids, skip_special=skip_special)
    assert "".join(pushed) + rest == tokenizer.decode(ids, skip_special=skip_special)


@settings(deadline=None)
@given(text=st.text())
def test_no_half_character_is_ever_given(tokenizers, text):
    for tokenizer in tokenizers:
        pushed, rest = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pushed).count("\ufffd") == text.count("\ufffd")
        assert rest == ""


def test_an_emoji_split_over_tokens_comes_whole(tokenizers):
    for tokenizer in tokenizers:
        ids = tokenizer.encode("x\U0001f642\u200d", add_bos=False)
        pushed, rest = streamed(tokenizer, ids)
        assert [text for text in pushed if text] in (["x", "\U0001f642", "\u200d"], [*"x\U0001f642\u200d"])
        assert rest == ""
        cut, rest = streamed(tokenizer, ids[: len(ids) - 4])
        assert "".join(cut) == "x"
        assert rest == "\ufffd"


def test_the_space_in_front_is_dropped_once(tokenizers):
    *others, metaspace, prefixed, unprefixed = tokenizers
    for tokenizer in (*others, prefixed, unprefixed):
        for text in ("hello the", " hello", "  hello", " ", ""):
            assert "".join(streamed(tokenizer, tokenizer.encode(text))[0]) == text
    # The library puts no space before one, and yet takes one away.
    for text, shown in (("hello the", "hello the"), (" hello", "hello"), ("  hello", " hello")):
        assert "".join(streamed(metaspace, metaspace.encode(text))[0]) == shown


def test_a_detokenizer_starts_afresh_after_flush():
    tokenizer = SentencePieceTokenizer(tiny.sentencepiece_model(), name="tiny.model")
    detokenizer, ids = Detokenizer(tokenizer), tokenizer.encode("hello")
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == "hello"
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == "hello"


def test_ids_outside_the_vocabulary_are_refused(tokenizers):
    with pytest.raises(ValueError, match="The token id -1 is outside the vocabulary"):
        Detokenizer(tokenizers[0]).push(-1)
