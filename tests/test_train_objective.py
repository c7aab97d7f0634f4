"""Objectives make of a text what the papers say, as often as they say."""

import functools

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.text import templates, tiny
from hypothesis import given, settings, strategies as st

from mistral_eqx import encode_chat, load_tokenizer
from mistral_eqx.train import (
    bert_mask,
    causal,
    chat,
    drop_spans,
    mass,
    one_a_row,
    pack,
    prefix_lm,
    replace_spans,
    scheduled_sampling,
)


VOCAB, MASK = 1000, 1000


def within(found, expected, draws):
    """Whether a frequency of independent draws is within five standard deviations of its probability."""
    return abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / draws)


def test_labels_are_shifted_by_one():
    example = causal([5, 6, 7, 8], learned=[9.0, 0, 1, 0.5])
    assert example.inputs.tolist() == [5, 6, 7]
    assert example.targets.tolist() == [6, 7, 8]
    assert example.weights.tolist() == [0, 1, 0.5]
    assert example.positions.tolist() == example.last.tolist() == [0, 1, 2]
    for ids in ([], [1]):
        with pytest.raises(ValueError, match="has no token to predict from another"):
            causal(ids)


def test_a_prefix_is_not_told():
    example = prefix_lm([5, 6, 7, 8, 9], 3)
    assert example.targets.tolist() == [6, 7, 8, 9]
    assert example.weights.tolist() == [0, 0, 1, 1]
    assert example.last.tolist() == [2, 2, 2, 3]
    for prefix in (0, 5):
        with pytest.raises(ValueError, match=f"A prefix of {prefix} tokens"):
            prefix_lm([5, 6, 7, 8, 9], prefix)


def _fates(ids, inputs):
    """How often a chosen token became the mask, another token, and stayed."""
    masked, kept = inputs == MASK, inputs == ids
    return masked.mean(), (~masked & ~kept).mean(), kept.mean()


def test_masks_of_bert():
    """[BERT](https://arxiv.org/abs/1810.04805), 3.1: 15 % of the tokens; of these 80 %, 10 % and 10 %."""
    random = np.random.default_rng(0)
    ids, never = random.integers(0, VOCAB, 200_000), (3, 4)
    example = bert_mask(ids, random, mask_id=MASK, vocab=VOCAB, never=never)
    chosen = example.weights > 0
    np.testing.assert_array_equal(example.targets, ids)
    np.testing.assert_array_equal(example.inputs[~chosen], ids[~chosen])
    assert not np.isin(ids[chosen], never).any()
    assert chosen.sum() == round(0.15 * (~np.isin(ids, never)).sum())
    # One in a thousand random tokens is the one that stood there.
    for found, expected in zip(_fates(ids[chosen], example.inputs[chosen]), (0.8, 0.0999, 0.1001), strict=True):
        assert within(found, expected, chosen.sum())
    assert (example.last == len(ids) - 1).all()
    # At least one token of a short text, and a refusal where none may be chosen.
    assert bert_mask([1, 2], random, mask_id=MASK, vocab=VOCAB).weights.sum() == 1
    with pytest.raises(ValueError, match="None of 2 tokens may be masked"):
        bert_mask([3, 4], random, mask_id=MASK, vocab=VOCAB, never=never)


def test_fragments_of_mass():
    """[MASS](https://arxiv.org/abs/1905.02450), 3.2, 4.1: half of the tokens in one piece, masked as in BERT."""
    random, length, starts, fates = np.random.default_rng(0), 20, [], []
    for _ in range(2000):
        ids = random.integers(0, VOCAB, length)
        example = mass(ids, random, mask_id=MASK, vocab=VOCAB)
        told = np.flatnonzero(example.weights)
        np.testing.assert_array_equal(told, np.arange(length, length + 10))
        start = example.positions[length]
        starts.append(start)
        np.testing.assert_array_equal(example.targets[told], ids[start : start + 10])
        # Behind the text, the mask and then each token, at the position of the one that is told.
        np.testing.assert_array_equal(example.inputs[told], [MASK, *ids[start : start + 9]])
        np.testing.assert_array_equal(example.positions, [*range(length), *range(start, start + 10)])
        outside = np.r_[0:start, start + 10 : length]
        np.testing.assert_array_equal(example.inputs[outside], ids[outside])
        fates.append(_fates(ids[start : start + 10], example.inputs[start : start + 10]))
        # The text sees itself, the fragment what came before.
        np.testing.assert_array_equal(example.last, [length - 1] * length + list(range(length, length + 10)))
    for found, expected in zip(np.mean(fates, axis=0), (0.8, 0.0999, 0.1001), strict=True):
        assert within(found, expected, 20_000)
    counts = np.bincount(starts, minlength=11)
    assert len(counts) == 11
    assert all(within(count / 2000, 1 / 11, 2000) for count in counts)


def _put_back(example, sentinels):
    """The text from which spans were taken: each sentinel in it replaced by what is told after that sentinel."""
    whole = [int(example.inputs[0]), *example.targets.tolist()]
    prefix = int(np.flatnonzero(example.weights)[0]) + 1
    text, told = whole[:prefix], whole[prefix:]
    spans, current = {}, None
    for token in told:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [token for one in text for token in spans.get(one, [one])], spans


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(0, 2**32 - 1))
def test_spans_can_be_put_back(length, seed):
    random, sentinels = np.random.default_rng(seed), list(range(2000, 2040))
    ids = random.integers(0, VOCAB, length).tolist()
    found, spans = _put_back(replace_spans(ids, random, sentinels=sentinels), sentinels)
    assert found == ids
    # One sentinel after the other, and the last stands for the end.
    assert list(spans) == sentinels[: len(spans)]
    assert spans[sentinels[len(spans) - 1]] == []


def test_spans_of_t5():
    """[T5](https://arxiv.org/abs/1910.10683), 3.1.4: 15 % of the tokens, in spans of three on average."""
    random, sentinels = np.random.default_rng(0), list(range(2000, 2040))
    lengths, first = [], []
    for _ in range(500):
        _, spans = _put_back(replace_spans(range(512), random, sentinels=sentinels), sentinels)
        *taken, end = spans.values()
        assert sum(map(len, taken)) == round(0.15 * 512) == 77
        assert len(taken) == round(77 / 3)
        assert end == []
        lengths += map(len, taken)
        first.append(taken[0][0])
    assert np.mean(lengths) == 77 / 26
    # All ways to cut 77 tokens into 26 spans are as likely: a span is of one token in 25 of 76 of them.
    assert abs(np.mean(np.array(lengths) == 1) - 25 / 76) < 0.02
    # So are those to cut what stays: 435 tokens in 26 parts.
    assert abs(np.mean(first) - 435 / 26) < 5 * np.std(first) / np.sqrt(500)
    with pytest.raises(ValueError, match="needs 27 sentinels, one for each of 26 spans and one for the end, not 3"):
        replace_spans(range(512), random, sentinels=[1, 2, 3])


def test_dropped_spans_leave_no_trace():
    """T5, table 3: `Thank you me to your party week .`, then `for inviting last`."""
    random = np.random.default_rng(0)
    example = drop_spans(range(100), random)
    whole = np.array([example.inputs[0], *example.targets])
    prefix = int(np.flatnonzero(example.weights)[0]) + 1
    assert prefix == 85
    assert sorted(whole) == list(range(100))
    for part in (whole[:prefix], whole[prefix:]):
        assert (np.diff(part) > 0).all()
    assert example.weights.tolist() == [0] * 84 + [1] * 15


# Conversations.


def _tokenizer(folder, template):
    path = tiny.write_gguf(folder / "tiny.gguf", **tiny.byte_level_metadata(chat_template=template))
    return load_tokenizer(path)


CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, you."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four."},
]


def test_only_the_assistant_is_learned(tmp_path):
    tokenizer = _tokenizer(tmp_path, templates.CHATML)
    example = chat(CONVERSATION, functools.partial(encode_chat, tokenizer))
    ids = encode_chat(tokenizer, CONVERSATION, add_generation_prompt=False)
    assert [int(example.inputs[0]), *example.targets.tolist()] == ids
    learned = tokenizer.decode(example.targets[example.weights > 0], skip_special=False)
    assert learned == "Hello, you.<|im_end|>\nFour.<|im_end|>\n"


def test_a_template_that_rewrites_what_it_wrote_is_refused(tmp_path):
    """This one moves the system's message into the last of the user's."""
    tokenizer = _tokenizer(tmp_path, templates.MISTRAL_3)
    encode = functools.partial(encode_chat, tokenizer)
    with pytest.raises(ValueError, match="changes the messages up to message 2"):
        chat(CONVERSATION, encode)
    example = chat(CONVERSATION[1:], encode)
    learned = tokenizer.decode(example.targets[example.weights > 0], skip_special=False)
    assert learned == " Hello, you.<|im_end|> Four.<|im_end|>"
    with pytest.raises(ValueError, match="nothing to learn"):
        chat(CONVERSATION[:2], encode)


# Scheduled sampling.


def test_inputs_become_what_the_model_said():
    """[Bengio et al., 2015](https://arxiv.org/abs/1506.03099): each token by a coin of its own."""
    batch = pack([causal(np.arange(length)) for length in (3000, 2000, 4000)], 6000)
    said = jnp.asarray(batch.targets + 5000)
    for probability in (0.0, 0.25, 1.0):
        mixed = scheduled_sampling(batch, said, probability, key=jr.key(0))
        changed = np.asarray(mixed.inputs) != batch.inputs
        np.testing.assert_array_equal(mixed.inputs[changed], batch.inputs[changed] + 5000)
        np.testing.assert_array_equal(mixed.targets, batch.targets)
        # A text's first token is nobody's word, and padding nobody's at all.
        assert not changed[batch.positions <= 0].any()
        assert within(changed[batch.positions > 0].mean(), probability, 8996) or probability in (0, 1)
        assert changed.any() == (probability > 0)
    assert changed[batch.positions > 0].all()


def test_what_is_not_learned_is_not_replaced():
    batch = one_a_row([causal(range(9), learned=[0] * 4 + [1] * 5)], 8)
    mixed = scheduled_sampling(batch, jnp.full((1, 8), 99), 1.0, key=jr.key(0))
    assert mixed.inputs[0].tolist() == [0, 1, 2, 3, 99, 99, 99, 99]
