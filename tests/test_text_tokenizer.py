import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.text import tiny
from hypothesis import given, settings, strategies as st

from mistral_eqx.text import Detokenizer, SentencePieceTokenizer, StopText, load_tokenizer


MODEL = SentencePieceTokenizer(tiny.sentencepiece_model(), name="tiny.model")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    path = tmp_path_factory.mktemp("byte_level") / "tiny.gguf"
    return load_tokenizer(tiny.write_gguf(path, **tiny.byte_level_metadata()))


def test_names_of_control_tokens_are_text_unless_they_are_asked_for(byte_level):
    text = "<|im_start|>user\n<|im_end|><|im_start|"
    plain, parsed = byte_level.encode(text), byte_level.encode(text, parse_special=True)
    assert not set(plain) & byte_level.special_ids
    assert [id for id in parsed if id in byte_level.special_ids] == [1, 2]
    assert byte_level.decode(plain) == text
    assert byte_level.decode(parsed) == "user\n<|im_start|"
    assert byte_level.decode(parsed, skip_special=False) == text


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back(byte_level, text):
    assert byte_level.decode(byte_level.encode(text)) == text
    assert MODEL.decode(MODEL.encode(text)) == text.replace("\u2581", " ")


@settings(deadline=None)
@given(parts=st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_end|", "a", " ", "\n", "<", "é"])))
def test_parsing_control_tokens_keeps_all_of_the_text(byte_level, parts):
    text = "".join(parts)
    ids = byte_level.encode(text, parse_special=True)
    assert byte_level.decode(ids, skip_special=False) == text
    assert sum(id in (1, 2) for id in ids) == text.count("<|im_start|>") + text.count("<|im_end|>")


def test_beginning_of_text(byte_level):
    assert byte_level.encode("a", add_bos=True) == [1, *byte_level.encode("a")]
    assert MODEL.encode("a") == [1, *MODEL.encode("a", add_bos=False)]
    nameless = SentencePieceTokenizer(
        tiny.sentencepiece_model().replace(b"<s>", b"<q>"), name="tiny.model", adds_bos=False
    )
    assert nameless.bos_id is None
    with pytest.raises(ValueError, match=r"tiny.model has no beginning-of-sequence token; leave out add_bos=True\."):
        nameless.encode("a", add_bos=True)


def test_half_a_surrogate_pair_is_refused(byte_level):
    with pytest.raises(ValueError, match="half a surrogate pair at position 2"):
        byte_level.encode("ab\ud800")


def test_decode_takes_arrays(byte_level):
    ids = byte_level.encode("hello the 天")
    for array in (np.array(ids, np.int32), jnp.array(ids), tuple(ids), iter(ids)):
        assert byte_level.decode(array) == "hello the 天"


def test_decode_refuses_negative_ids(byte_level):
    with pytest.raises(ValueError, match=rf"The token id -1 is outside the vocabulary of {byte_level.vocab} of"):
        byte_level.decode([3, -1])


def test_ids_past_the_vocabulary_are_no_text(byte_level):
    """The rows with which models pad their embedding have numbers and no names."""
    (a,) = byte_level.encode("a")
    for tokenizer in (byte_level, MODEL):
        for id in (tokenizer.vocab, 10**6):
            assert tokenizer.decode([id, a]) == tokenizer.decode([a])
            assert tokenizer.token_name(id) == ""


# Ids of a prompt and of what follows it; in MODEL 260 is ordinary and 1 to 3 are control tokens.
TOKENS = [1, 2, 3, 260, *MODEL.encode("hello the t  t", add_bos=False), 44, 9999]


@settings(deadline=None)
@given(prompt=st.lists(st.sampled_from(TOKENS[:-1]), max_size=4), new=st.lists(st.sampled_from(TOKENS), max_size=4))
def test_a_continuation_goes_on_where_its_prompt_ends(prompt, new):
    """Unless the prompt ends with a control token: what follows one begins a text."""
    for skip_special in (True, False):
        if skip_special and prompt and prompt[-1] in MODEL.special_ids:
            expected = MODEL.decode(new)
        else:
            expected = MODEL.decode([*prompt, *new], skip_special=skip_special).removeprefix(
                MODEL.decode(prompt, skip_special=skip_special)
            )
        assert MODEL.decode(new, skip_special=skip_special, after=prompt) == expected
        detokenizer = Detokenizer(MODEL, skip_special=skip_special, after=prompt)
        assert "".join(map(detokenizer.push, new)) + detokenizer.flush() == expected
    text = StopText(MODEL, ["\0"], after=prompt)
    assert "".join(map(text.push, new)) + text.flush() == MODEL.decode(new, after=prompt)


def test_the_first_space_of_a_continuation_is_kept():
    prompt, whole = MODEL.encode("hello"), MODEL.encode("hello the")
    assert whole[: len(prompt)] == prompt
    assert MODEL.decode(whole[len(prompt) :], after=prompt) == " the"
    assert MODEL.decode(whole[len(prompt) :]) == MODEL.decode(whole[len(prompt) :], after=[*prompt, 3]) == "the"


def test_bytes_that_are_no_utf8_become_replacement_characters(byte_level):
    (e,) = byte_level.encode("e")
    first = byte_level.encode("é")[0]
    assert byte_level.decode([first, e]) == "\ufffde"
    assert byte_level.decode([first]) == "\ufffd"
