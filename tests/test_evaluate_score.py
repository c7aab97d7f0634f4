"""Scores are those of the whole forward pass, however rows are read and whoever stands beside them."""

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.generation import PROMPTS, VOCAB, greedy_without_cache, logits_of, random_prompts, refused, talking_model
from fixtures.sharding import exchanges
from hypothesis import given, settings, strategies as st

import mistral_eqx as mx
from mistral_eqx.evaluate import scoring as module


# Sums of 61 exponentials in float32, of logits whose own error is 2e-5 of the largest: see fixtures/model.py.
TOLERANCE = 1e-4
WIDTH = 112


def expected(model, row):
    """Log-probabilities and whether each token is the likeliest, from all logits at once, in float64."""
    logits = logits_of(model, row, width=WIDTH).astype(np.float64)[:-1]
    log_probs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    log_probs -= logits.max(1, keepdims=True)
    targets = np.asarray(row[1:], int)
    return log_probs[np.arange(len(targets)), targets], logits.argmax(1) == targets


def assert_scored(model, scores, rows):
    assert scores.lengths.tolist() == list(map(len, rows))
    assert scores.log_probs.shape == scores.greedy.shape == (len(rows), max(map(len, rows)))
    for log_probs, greedy, row in zip(scores.log_probs, scores.greedy, rows, strict=True):
        likely, likeliest = expected(model, row)
        np.testing.assert_allclose(log_probs[1 : len(row)], likely, atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(greedy[1 : len(row)], likeliest)
        rest = np.r_[0, len(row) : log_probs.shape[0]]
        assert not np.asarray(log_probs)[rest].any()
        assert not np.asarray(greedy)[rest].any()


@pytest.fixture(scope="module")
def model():
    # The longest row has one token more.
    return talking_model(max_positions=99)


@settings(max_examples=8, deadline=None)
@given(
    # The longest decides on the shapes that are compiled.
    lengths=st.permutations([1, 2, 5, 15, 16, 17, 40, 99]).map(lambda lengths: [*lengths[:2], 100]),
    prefill_chunk=st.sampled_from([7, 16, 512]),
    seed=st.integers(0, 100),
)
@pytest.mark.slow
def test_scores_are_the_log_softmax_of_the_whole_forward_pass(model, lengths, prefill_chunk, seed):
    rows = random_prompts(*lengths, seed=seed)
    assert_scored(model, mx.score(model, rows, prefill_chunk=prefill_chunk), rows)


def test_the_likeliest_tokens_are_said_to_be(model):
    new = greedy_without_cache(model, PROMPTS, 2, width=WIDTH)
    rows = [[*prompt, *tokens] for prompt, tokens in zip(PROMPTS, new, strict=True)]
    scores = mx.score(model, rows)
    for row, prompt in enumerate(PROMPTS):
        assert scores.greedy[row, len(prompt) : len(prompt) + 2].all()
    assert not scores.greedy[2, :14].all()


def test_rows_come_as_padded_arrays_too(model):
    rows = random_prompts(3, 7, 5)
    for side in (slice(None), slice(None, None, -1)):
        ids = np.full((3, 9), -1)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = row[side]
        assert_scored(model, mx.score(model, ids[:, side]), rows)


def test_tied_heads_and_16_bits():
    tied = talking_model(tied=True, windows=(None,))
    assert_scored(tied, mx.score(tied, PROMPTS), PROMPTS)
    half = talking_model(windows=(None,), dtype=jnp.bfloat16)
    scores = mx.score(half, PROMPTS, prefill_chunk=8)
    assert scores.log_probs.dtype == jnp.float32
    # Three significant digits ; a wrong token would be off by whole numbers.
    likely, _ = expected(half, PROMPTS[2])
    np.testing.assert_allclose(scores.log_probs[2, 1:14], likely, atol=0.15)


def test_only_the_last_tokens(model):
    rows = random_prompts(100, 30, 90)
    scores, ends = mx.score(model, rows, prefill_chunk=16), mx.score(model, rows, prefill_chunk=16, last=20)
    for row, length in enumerate(map(len, rows)):
        np.testing.assert_array_equal(ends.log_probs[row, length - 20 :], scores.log_probs[row, length - 20 :])
        np.testing.assert_array_equal(ends.greedy[row, length - 20 :], scores.greedy[row, length - 20 :])
    # Of 112 columns, 13 are padding, and pieces of 16 before the last 20, the first 80 in all, are not scored.
    assert not ends.log_probs[0, :68].any()
    assert ends.log_probs[0, 68:].all()


@pytest.fixture(scope="module")
def divisible():
    model = talking_model(windows=(7,), vocab=60, hidden=48)
    rows = [[token % 60 for token in row] for row in random_prompts(48, 3, 17)]
    return model, rows, mx.score(model, rows, prefill_chunk=24)


@pytest.mark.parametrize(
    ("axes", "layout"),
    [
        ("tp=2", mx.SEQUENCE_PARALLEL.layout),
        ("tp=4", mx.HEAD_DIM.layout),
        ("kv=2,rep=3", mx.HEADS_X_KV_SEQ.layout),
        ("dp=2,tp=2", f"{mx.HEADS.layout} batch@dp"),
    ],
    ids=["sequence_parallel", "head_dim", "heads_x_kv_seq", "heads and batch"],
)
@pytest.mark.slow
def test_split_models_score_the_same(divisible, axes, layout):
    model, rows, scores = divisible
    found = mx.score(mx.shard(model, mx.make_mesh(axes), mx.Strategy(layout)), rows, prefill_chunk=24)
    np.testing.assert_allclose(found.log_probs, scores.log_probs, atol=TOLERANCE)
    np.testing.assert_array_equal(found.greedy, scores.greedy)


def test_devices_exchange_no_logits(divisible):
    parts = mx.shard(divisible[0], mx.make_mesh("tp=2"), mx.HEADS)
    ids = module.place_rows(parts, np.zeros((3, 24), np.int32))
    cache = module.empty_cache(parts, 3, 48, 24)
    found = exchanges(module._score_chunk.lower((parts, ids, ids, ids), cache))
    # The residual stream, after the embedding and in one layer twice, and four numbers a token.
    stream, token = 3 * 24 * 24 * 4, 3 * 24 * 4
    assert found["all_reduce", stream, 2] == 3
    assert sum(bytes * times for (_, bytes, _), times in found.items()) == 3 * stream + 4 * token
    assert {kind for kind, *_ in found} == {"all_reduce"}


def test_memory_does_not_hold_logits_of_a_long_row():
    model = talking_model(windows=(None,), vocab=16384)
    ids = jnp.zeros((1, 2048), jnp.int32)
    cache = module.empty_cache(model, 1, 2048, None)
    memory = module._score_chunk.lower((model, ids, ids, ids), cache).compile().compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 16384 * 4 / 2


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, ["There is no prompt"]),
        ([[1], []], {}, ["Prompt 1 is empty"]),
        ([[VOCAB]], {}, ["token id 61"]),
        ([[1] * 101], {}, ["row of 101 tokens", "context of 99"]),
        ([[1, 2]], {"prefill_chunk": 0}, ["prefill_chunk is 0"]),
    ],
)
def test_bad_rows_are_refused(model, rows, options, words):
    with refused(*words):
        mx.score(model, rows, **options)
