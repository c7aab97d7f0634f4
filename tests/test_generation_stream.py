import jax
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import (
    PROGRAMS,
    PROMPTS,
    VOCAB,
    count_compilations,
    greedy_without_cache,
    random_prompts,
    refused,
    spy,
    talking_model,
)
from hypothesis import given, settings, strategies as st

from mistral_eqx import Conversation, Sampler, generate, stream


NUCLEUS = Sampler(temperature=1.5, top_p=0.95)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=16), min_size=3, max_size=3),
    sampler=st.sampled_from([Sampler(), NUCLEUS]),
    ends=st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=3),
    new=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
@pytest.mark.slow
def test_a_stream_and_a_conversation_say_what_generate_says(rows, sampler, ends, new, seed):
    model = talking_model()
    options = {"max_new_tokens": new, "sampler": sampler, "eos_id": ends, "key": jr.key(seed)}
    out = generate(model, rows, **options)
    entries = list(stream(model, rows, **options))
    lengths = out.lengths.tolist()
    assert len(entries) == max(lengths)
    assert {(entry.dtype, entry.shape) for entry in entries} == {(np.dtype(np.int32), (3,))}
    for row, length in enumerate(lengths):
        tokens = out.tokens[row, :length].tolist()
        assert [int(entry[row]) for entry in entries] == tokens + [-1] * (len(entries) - length)
    assert list(Conversation(model).reply(rows[0], **options)) == out.tokens[0, : lengths[0]].tolist()


def test_the_first_token_is_there_before_the_loop_is_compiled(monkeypatch):
    # A model of its own shape, for which nothing has been compiled yet.
    model = talking_model(windows=(None,), norm_eps=4e-5)
    decodes = spy(monkeypatch, "decode")
    tokens = stream(model, PROMPTS[:1], max_new_tokens=5)
    with count_compilations() as compiled:
        first = next(tokens)
    assert compiled["read_chunk"] == 1
    assert compiled["decode"] == 0
    assert decodes == []
    # From then on each token is handed over before the next is asked for.
    second = next(tokens)
    assert len(decodes) == 1
    third = next(tokens)
    assert len(decodes) == 2
    expected = generate(model, PROMPTS[:1], max_new_tokens=5).tokens[0].tolist()
    assert [int(entry[0]) for entry in (first, second, third, *tokens)] == expected


@pytest.mark.slow
def test_a_stream_stops_when_all_rows_have_ended(monkeypatch):
    model = talking_model()
    free = generate(model, PROMPTS, max_new_tokens=24).tokens.tolist()
    decodes = spy(monkeypatch, "decode")
    assert len(list(stream(model, PROMPTS, max_new_tokens=24, eos_id=[row[0] for row in free]))) == 1
    assert decodes == []
    ends = [free[0][9], free[1][6], free[2][3]]
    entries = list(stream(model, PROMPTS, max_new_tokens=24, eos_id=ends))
    assert 1 < len(entries) <= 10
    # The first token comes from reading the prompts.
    assert len(decodes) == len(entries) - 1


def test_a_stream_can_be_left_early(monkeypatch):
    model = talking_model()
    expected = generate(model, PROMPTS, max_new_tokens=24).tokens
    decodes = spy(monkeypatch, "decode")
    tokens = stream(model, PROMPTS, max_new_tokens=24)
    for column in range(3):
        np.testing.assert_array_equal(next(tokens), expected[:, column])
    tokens.close()
    assert len(decodes) == 2
    assert list(tokens) == []
    # The model is as it was: it was not given away with the cache.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array))
    np.testing.assert_array_equal(np.stack(list(stream(model, PROMPTS, max_new_tokens=24)), 1), expected)


def read_ids(prefills):
    """The tokens that were read, without padding."""
    return [int(id) for ((_, ids, positions), _), _ in prefills for id in np.asarray(ids)[np.asarray(positions) >= 0]]


def reply(chat, text, new=6):
    return list(chat.reply(text, max_new_tokens=new))


def assert_replies_as_from_scratch(model, chat, text, new=6):
    """Asks for a reply, and compares it with what a forward pass over the whole text says for each token."""
    said = reply(chat, text, new)
    assert [said] == greedy_without_cache(model, [text], new)
    return said


@pytest.fixture
def chat():
    return Conversation(talking_model())


@pytest.mark.slow
def test_each_turn_reads_only_what_is_new(chat, monkeypatch):
    model, prefills, text = talking_model(), spy(monkeypatch, "read_chunk"), list(PROMPTS[0])
    known = 0
    for heard in ([11, 12], [20] * 9, [33, 44, 55]):
        text += heard
        prefills.clear()
        said = assert_replies_as_from_scratch(model, chat, text)
        assert read_ids(prefills) == text[known:]
        text += said
        # The last token was said, but not read yet.
        known = len(text) - 1


@pytest.mark.slow
def test_a_turn_draws_what_generate_draws(chat):
    text = [*PROMPTS[0], 17]
    said = list(chat.reply(text, max_new_tokens=6, sampler=NUCLEUS, key=jr.key(0)))
    text += [*said, 11, 12]
    again = list(chat.reply(text, max_new_tokens=10, sampler=NUCLEUS, key=jr.key(1)))
    out = generate(talking_model(), [text], max_new_tokens=10, sampler=NUCLEUS, key=jr.key(1))
    assert [again] == out.tokens.tolist()


def test_a_turn_after_an_end_token(chat):
    model, text = talking_model(), list(PROMPTS[1])
    free = reply(Conversation(model), text, 10)
    end = free[4]
    said = list(chat.reply(text, max_new_tokens=10, eos_id=end))
    assert said == free[: free.index(end) + 1]
    assert_replies_as_from_scratch(model, chat, [*text, *said, 3, 4])


@pytest.mark.parametrize(
    ("edit", "kept"),
    [
        (lambda text: [*text[:5], 42, *text[6:]], 5),
        (lambda text: text[:9], 8),
        (lambda text: text, 19),
        (lambda text: [59, *text], 0),
        (lambda text: [*text[:14], *text[15:], 9], 14),
    ],
    ids=["a token changed", "cut off", "the same again", "all shifted", "a token of the reply left out"],
)
def test_a_turn_after_history_was_edited(chat, edit, kept, monkeypatch):
    model, text = talking_model(), list(PROMPTS[2])
    text += reply(chat, text)
    prefills, text = spy(monkeypatch, "read_chunk"), edit(text)
    said = assert_replies_as_from_scratch(model, chat, text)
    assert read_ids(prefills) == text[kept:]
    assert_replies_as_from_scratch(model, chat, [*text, *said, 1, 2, 3])


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("closed", [True, False])
def test_a_turn_after_a_reply_was_left_early(chat, taken, closed):
    model, text = talking_model(), list(PROMPTS[1])
    text += [*reply(chat, text), 30]
    tokens = chat.reply(text, max_new_tokens=8)
    said = [next(tokens) for _ in range(taken)]
    if closed:
        tokens.close()
    assert [said] == greedy_without_cache(model, [text], taken)
    assert_replies_as_from_scratch(model, chat, [*text, *said, 31])


@pytest.mark.parametrize("donated", [True, False], ids=["in a step", "before a step"])
@pytest.mark.parametrize(("function", "call"), [("read_chunk", 1), ("decode", 1), ("decode", 2), ("decode", 5)])
def test_a_turn_after_an_interrupt(chat, function, call, donated, monkeypatch):
    model, text = talking_model(), list(PROMPTS[1])
    text += [*reply(chat, text), 30]
    run, calls = getattr(PROGRAMS[function], function), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) < call:
            return run(*arguments)
        if donated:
            run(*arguments)
            assert any(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[-1]))
        raise KeyboardInterrupt

    said = []
    with monkeypatch.context() as patch:
        patch.setattr(PROGRAMS[function], function, interrupted)
        with pytest.raises(KeyboardInterrupt):
            said += chat.reply(text, max_new_tokens=8)
    assert len(calls) == call
    assert_replies_as_from_scratch(model, chat, [*text, *said, 31])


@pytest.mark.slow
def test_a_conversation_outgrows_its_cache(monkeypatch):
    model = talking_model(windows=(7,))
    chat, (text,) = Conversation(model), random_prompts(90)
    prefills, known = spy(monkeypatch, "read_chunk"), 0
    for heard, slots in (([], 128), ([1, 2, 3], 256), ([4, 5, 6], 256)):
        text += heard
        prefills.clear()
        said = reply(chat, text, 20)
        assert [said] == greedy_without_cache(model, [text], 20, width=192)
        assert read_ids(prefills) == text[known:]
        text += said
        known = len(text) - 1
        assert chat._cache is not None
        assert chat._cache.kv_seq == slots


@pytest.mark.slow
def test_asking_again_and_again_does_not_fill_the_memory(monkeypatch):
    model = talking_model(windows=(None,))
    chat, (text,) = Conversation(model), random_prompts(40)
    decodes = spy(monkeypatch, "decode")
    replies = [reply(chat, text, 20) for _ in range(12)]
    assert replies == [replies[0]] * 12
    # A cache of 128 slots holds the text and its reply; what was asked before takes no more than as many again.
    assert max(cache.kv_seq for _, (_, cache) in decodes) <= 256


def test_conversations_do_not_mix():
    model = talking_model()
    one, other = Conversation(model), Conversation(model)
    first, second = one.reply(PROMPTS[0], max_new_tokens=6), other.reply(PROMPTS[1], max_new_tokens=6)
    said = [list(pair) for pair in zip(*zip(first, second, strict=True), strict=True)]
    assert said == greedy_without_cache(model, PROMPTS[:2], 6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ids": []}, ["Prompt 0 is empty"]),
        ({"ids": [VOCAB]}, [f"token id {VOCAB}"]),
        ({"ids": [1] * 63}, ["63 tokens", "context of 64 tokens"]),
        ({"max_new_tokens": 0}, ["max_new_tokens is 0"]),
        ({"sampler": NUCLEUS}, ["give a key"]),
        ({"key": jr.split(jr.key(0), 2), "sampler": NUCLEUS}, ["keys of shape (2,)"]),
    ],
)
def test_a_reply_refuses_mistakes_at_the_call_and_goes_on(arguments, words):
    model = talking_model(windows=(None,), max_positions=64)
    chat = Conversation(model)
    with refused(*words):
        chat.reply(**({"ids": [1], "max_new_tokens": 4} | arguments))
    assert_replies_as_from_scratch(model, chat, [1, 2], 4)
