import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import PIECES, PROMPTS, TOKENIZER, VOCAB, Pieces, refused, spy, talking_model
from hypothesis import given, settings, strategies as st

from mistral_eqx import Conversation, Sampler, StopText, generate, prefill, stream
from mistral_eqx.generation import generation


class Words(Pieces):
    """Tokens that each begin with a space, which the first one of a text loses."""

    def token_bytes(self, id, *, first):
        piece = super().token_bytes(id, first=first)
        return piece.removeprefix(b" ") if first else piece


WORDS = Words([f" w{number}".encode() for number in range(VOCAB - 1)])


def cut_by_definition(text, stops):
    """The text before the stop string that is complete first, and that string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    ids=st.lists(st.integers(0, VOCAB - 1), max_size=12),
    stops=st.lists(st.text("ab\né", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_text_is_cut_where_the_first_stop_string_begins(ids, stops):
    expected, stopped = cut_by_definition(TOKENIZER.decode(ids), stops)
    text = StopText(TOKENIZER, stops)
    given = ""
    for count, id in enumerate(ids, 1):
        given += text.push(id)
        # Nothing that was given has to be taken away again, and what is held back may still become a stop string.
        assert expected.startswith(given)
        certain, found = cut_by_definition(TOKENIZER.decode(ids[:count]).rstrip("\ufffd"), stops)
        if found is None and stopped is None and "\ufffd" not in certain:
            assert len(certain) - len(given) < max(map(len, stops))
    given += text.flush()
    assert given == expected
    assert text.stopped == stopped


@pytest.mark.parametrize(
    ("ids", "stop", "text", "count"),
    [
        ("a<b", "<end>", "a", 2),
        ("ab<b", "b<end>", "a", 3),
        ("a<<b", "<end><end>", "a", 3),
        ("a<bc", "end>b", "a", 3),
        ("a<bc", "<end>bd", "abc", 4),
        ("a<<bc", "<end>b", "a", 4),
        # What is shown has no stop string either.
        ("a<bc", "ab", "", 3),
        ("a<bc", ["bc", "d>b"], "a", 3),
    ],
)
def test_stop_strings_may_name_control_tokens(ids, stop, text, count):
    """`<` stands for the control token, whose name is `<end>`."""
    ids = [VOCAB - 1 if letter == "<" else PIECES.index(letter.encode()) for letter in ids]
    stops = StopText(TOKENIZER, stop)
    given, read = "", 0
    for id in ids:
        if stops.stopped is None:
            given, read = given + stops.push(id), read + 1
    assert (given + stops.flush(), read) == (text, count)


@pytest.fixture(scope="module")
def free():
    """What the prompts give without stop strings: tokens and texts."""
    out = generate(talking_model(windows=(None,)), PROMPTS, max_new_tokens=40, tokenizer=TOKENIZER)
    return out.tokens.tolist(), out.texts


def stopped_at(tokens, stops):
    """The text of a row and how many of its tokens it takes, by decoding all of its beginnings."""
    for length in range(1, len(tokens) + 1):
        text, found = cut_by_definition(TOKENIZER.decode(tokens[:length]), stops)
        if found is not None:
            return text, length
    return TOKENIZER.decode(tokens), len(tokens)


@pytest.mark.slow
def test_texts_without_stop_strings(free):
    tokens, texts = free
    assert texts == [TOKENIZER.decode(row) for row in tokens]
    out = generate(talking_model(windows=(None,)), PROMPTS, max_new_tokens=40, tokenizer=TOKENIZER, eos_id=tokens[1][7])
    assert out.texts == [
        TOKENIZER.decode(row[:length]) for row, length in zip(tokens, out.lengths.tolist(), strict=True)
    ]


@pytest.mark.parametrize("place", [0, 1, 5, 17, 30])
def test_rows_end_where_their_text_has_a_stop_string(free, place):
    tokens, texts = free
    # One from the middle of a row's text, over the border of two tokens and more.
    stops = [texts[1][place : place + 3], texts[2][place + 2 : place + 6]]
    out = generate(talking_model(windows=(None,)), PROMPTS, max_new_tokens=40, stop=stops, tokenizer=TOKENIZER)
    expected = [stopped_at(row, stops) for row in tokens]
    assert out.texts == [text for text, _ in expected]
    assert out.lengths.tolist() == [length for _, length in expected]
    assert min(out.lengths.tolist()) < 40
    for row, length, found in zip(tokens, out.lengths.tolist(), out.tokens.tolist(), strict=True):
        assert found == row[:length] + [row[length - 1]] * (40 - length)


def test_a_stream_ends_rows_at_the_token_that_completes_a_stop_string(free):
    tokens, texts = free
    stops = [texts[0][9:12], texts[1][20:24]]
    options = {"max_new_tokens": 40, "stop": stops, "tokenizer": TOKENIZER}
    expected = [row[: stopped_at(row, stops)[1]] for row in tokens]
    entries = np.stack(list(stream(talking_model(windows=(None,)), PROMPTS, **options)), 1)
    assert [[int(id) for id in row if id >= 0] for row in entries] == expected
    assert entries.shape[1] == max(map(len, expected))
    assert list(Conversation(talking_model(windows=(None,))).reply(PROMPTS[0], **options)) == expected[0]


def test_end_tokens_and_stop_strings_together(free):
    tokens, texts = free
    stops, end = [texts[0][12:15]], tokens[1][4]
    out = generate(
        talking_model(windows=(None,)), PROMPTS, max_new_tokens=40, stop=stops, tokenizer=TOKENIZER, eos_id=end
    )
    for row, text, length in zip(tokens, out.texts, out.lengths.tolist(), strict=True):
        first_end = row.index(end) + 1 if end in row else 40
        expected, expected_length = stopped_at(row[:first_end], stops)
        assert (text, length) == (expected, expected_length)


def test_the_loop_goes_on_for_no_more_than_a_piece(free, monkeypatch):
    decodes = spy(monkeypatch, "decode")
    _, texts = free
    stops = [text[:4] for text in texts]
    out = generate(talking_model(windows=(None,)), PROMPTS, max_new_tokens=40, stop=stops, tokenizer=TOKENIZER)
    assert max(out.lengths.tolist()) <= 5
    ((_, (decoding, _)),) = decodes
    assert int(decoding.step) <= 1 + generation._STRIDE


def test_a_row_that_stopped_draws_on_as_if_it_had_not(free):
    # The others' random numbers do not depend on it.
    options = {"max_new_tokens": 24, "sampler": Sampler(temperature=1.5), "key": jr.key(0), "tokenizer": TOKENIZER}
    whole = generate(talking_model(windows=(None,)), PROMPTS, **options)
    stops = [whole.texts[0][3:6]]
    out = generate(talking_model(windows=(None,)), PROMPTS, stop=stops, **options)
    for row, found, length in zip(whole.tokens.tolist(), out.tokens.tolist(), out.lengths.tolist(), strict=True):
        assert length == stopped_at(row, stops)[1]
        assert found[:length] == row[:length]
    assert out.lengths[0] < 24


def test_log_probabilities_end_with_their_row(free):
    _, texts = free
    options = {"max_new_tokens": 24, "logprobs": 2, "tokenizer": TOKENIZER}
    whole = generate(talking_model(windows=(None,)), PROMPTS, **options)
    out = generate(talking_model(windows=(None,)), PROMPTS, stop=[texts[0][5:8]], **options)
    counts = np.arange(24) < np.asarray(out.lengths)[:, None]
    assert not counts.all()
    np.testing.assert_array_equal(out.log_probs, np.where(counts, whole.log_probs, 0))
    np.testing.assert_array_equal(out.top_tokens, np.where(counts[..., None], whole.top_tokens, 0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stop": [""]}, ["stop string ''", "at least one character"]),
        ({"stop": ""}, ["stop string ''"]),
        ({"stop": ["a", 3]}, ["stop string 3"]),
        ({"stop": "a", "tokenizer": None}, ["Stop strings", "give the tokenizer"]),
    ],
)
@pytest.mark.parametrize("call", [generate, stream])
def test_mistakes_are_refused_in_one_sentence(call, arguments, words):
    with refused(*words):
        call(talking_model(windows=(None,)), PROMPTS, **({"max_new_tokens": 4, "tokenizer": TOKENIZER} | arguments))


@pytest.mark.parametrize("way", ["lists", "array", "samples", "prefix", "stop", "stream"])
def test_texts_continue_their_prompts(way):
    """A prompt's text and that of its continuation are the text of all ids; after a control token a text begins."""
    model, prompts = talking_model(windows=(None,)), [*PROMPTS[:2], [4, VOCAB - 1]]
    options = {"max_new_tokens": 6, "tokenizer": WORDS}
    before = prompts
    if way == "samples":
        options |= {"num_samples": 2, "sampler": Sampler(temperature=1.0), "key": jr.key(0)}
        before = [row for row in prompts for _ in range(2)]
    elif way == "prefix":
        options["prefix"] = prefill(model, [3, VOCAB - 1])
    elif way == "stop":
        options["stop"] = "no such text"
    given = prompts
    if way == "array":
        width = max(map(len, prompts))
        given = np.asarray([[-1] * (width - len(row)) + row for row in prompts], np.int32)
    if way == "stream":
        del options["tokenizer"]
        rows = np.stack(list(stream(model, given, **options)), 1).tolist()
        made = [StopText(WORDS, (), after=row) for row in prompts]
        texts = ["".join(map(text.push, row)) + text.flush() for text, row in zip(made, rows, strict=True)]
    else:
        out = generate(model, given, **options)
        rows, texts = out.tokens.tolist(), out.texts
    for prompt, row, text in zip(before, rows, texts, strict=True):
        if prompt[-1] == VOCAB - 1:
            assert text == WORDS.decode(row)
        else:
            assert WORDS.decode(prompt) + text == WORDS.decode([*prompt, *row])
    assert texts[0].startswith(" w")
