"""Generation with a quantized cache: what does not depend on batch, chunks, prefix or devices still does not.

In float64: in float32, sums in another order may move a number that is halfway between two codes to the other one.
"""

import dataclasses
import functools
import importlib
import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.equality import on, precision, random_model
from fixtures.generation import random_prompts, refused, talking_model
from fixtures.model import padded, run

import mistral_eqx as mx
from mistral_eqx.nn import Cache
from mistral_eqx.parallel import NAMED


CODES = ["int8", "float8_e4m3"]
NEW, WIDTH = 6, 48
PROMPTS = random_prompts(3, 13, 20)
# Float64 sums in another order, of log-probabilities of about 10.
TOLERANCE = 1e-11
# Reported log-probabilities are computed in float32: logits below 8, and three operations with them, round by half of
# eps each.
REPORTED = {"rtol": 0, "atol": 4 * 8 * 2**-24}


@functools.lru_cache
def model():
    config = dataclasses.replace(talking_model(windows=(None, 7)).config, vocab=72, hidden=48)
    return random_model(config, "float64")


def log_probs(text, cache_dtype):
    """Those of the tokens after each of a text, from one pass over the whole of it."""
    ids, positions = padded([text], WIDTH, "right")
    cache = Cache.init(model().config, 1, WIDTH, model().dtype, cache_dtype)
    logits = run(model(), ids, positions, cache)[0][0, : len(text)]
    assert np.abs(logits).max() < 8
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def greedy(row, cache_dtype):
    """The new tokens, and the log-probabilities of each."""
    text, found = list(row), []
    for _ in range(NEW):
        last = log_probs(text, cache_dtype)[-1]
        text.append(int(last.argmax()))
        found.append(last.max())
    return text[len(row) :], found


@pytest.mark.parametrize("cache_dtype", [CODES[0], pytest.param(CODES[1], marks=pytest.mark.slow)])
def test_rows_are_what_one_pass_over_each_gives(cache_dtype):
    """In a batch with padding, in chunks, with a window that the prompts are longer than."""
    with precision("float64"):
        options = {"max_new_tokens": NEW, "cache_dtype": cache_dtype}
        out = mx.generate(model(), PROMPTS, prefill_chunk=8, logprobs=0, **options)
        for row, tokens, found in zip(PROMPTS, out.tokens.tolist(), out.log_probs, strict=True):
            expected_tokens, expected = greedy(row, cache_dtype)
            assert tokens == expected_tokens
            np.testing.assert_allclose(found, expected, **REPORTED)
        # The codes do change something.
        floats = mx.generate(model(), PROMPTS, logprobs=0, max_new_tokens=NEW)
        assert np.abs(floats.log_probs - out.log_probs).max() > 1e-3


@pytest.mark.parametrize("cache_dtype", CODES)
@pytest.mark.slow
def test_a_stream_and_a_prefix_give_the_same(cache_dtype):
    with precision("float64"):
        options = {"max_new_tokens": NEW, "cache_dtype": cache_dtype}
        out = mx.generate(model(), PROMPTS, **options)
        np.testing.assert_array_equal(np.transpose(list(mx.stream(model(), PROMPTS, **options))), out.tokens)
        prefix = mx.prefill(model(), PROMPTS[2][:9], cache_dtype=cache_dtype)
        shared = mx.generate(model(), [PROMPTS[2][9:]], max_new_tokens=NEW, prefix=prefix)
        np.testing.assert_array_equal(shared.tokens[0], out.tokens[2])


@pytest.mark.parametrize("cache_dtype", CODES)
@pytest.mark.slow
def test_a_conversation_with_an_edit_is_what_generate_gives(cache_dtype):
    with precision("float64"):
        chat = mx.Conversation(model(), cache_dtype=cache_dtype)
        for row in (PROMPTS[2], PROMPTS[2][:15] + PROMPTS[1]):
            expected = mx.generate(model(), [row], max_new_tokens=NEW, cache_dtype=cache_dtype)
            assert list(chat.reply(row, max_new_tokens=NEW)) == expected.tokens[0].tolist()


@pytest.mark.parametrize("cache_dtype", CODES)
@pytest.mark.slow
def test_scores_are_those_of_one_pass(cache_dtype):
    with precision("float64"):
        scores = mx.score(model(), PROMPTS, prefill_chunk=8, cache_dtype=cache_dtype)
        for row, found in zip(PROMPTS, np.asarray(scores.log_probs), strict=True):
            expected = log_probs(row, cache_dtype)[np.arange(len(row) - 1), row[1:]]
            np.testing.assert_allclose(found[1 : len(row)], expected, **REPORTED)


@pytest.mark.parametrize("cache_dtype", CODES)
@pytest.mark.slow
def test_scores_of_beams_are_those_of_one_pass(cache_dtype, monkeypatch):
    """With a cache that is put in order every few steps."""
    beam = importlib.import_module("mistral_eqx.generation.beam")
    monkeypatch.setattr(beam, "_STEPS", 2)
    monkeypatch.setattr(beam, "capacity", lambda slots: slots)
    with precision("float64"):
        options = {"num_beams": 3, "max_new_tokens": NEW, "length_penalty": 0.0, "cache_dtype": cache_dtype}
        best = mx.beam_search(model(), PROMPTS[:2], num_return_sequences=3, **options)
        for row, texts, scores in zip(PROMPTS, best.tokens.tolist(), np.asarray(best.scores), strict=False):
            for text, score in zip(texts, scores, strict=True):
                found = log_probs(row + text, cache_dtype)[np.arange(len(row) - 1, len(row) + NEW - 1), text]
                assert score == pytest.approx(math.fsum(found), abs=NEW * TOLERANCE)


MESHES = {
    "heads": "tp=2",
    "head_dim": "tp=2",
    "sequence_parallel": "tp=2",
    "kv_replicated": "kv=2,rep=3",
    "heads_x_head_dim": "kv=2,rep=2",
    "heads_x_kv_seq": "kv=2,rep=2",
}


@functools.lru_cache
def on_one_device(cache_dtype):
    return mx.generate(model(), PROMPTS, max_new_tokens=NEW, logprobs=0, prefill_chunk=8, cache_dtype=cache_dtype)


# Scales are split in two ways: by heads and slots, and copied where `head_dim` is split.
_OFTEN = {"head_dim": (), "heads_x_kv_seq": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=_OFTEN.get(name, pytest.mark.long)) for name in MESHES])
@pytest.mark.parametrize("cache_dtype", [CODES[0], pytest.param(CODES[1], marks=pytest.mark.slow)])
def test_a_mesh_gives_what_one_device_gives(name, cache_dtype):
    with precision("float64"):
        expected = on_one_device(cache_dtype)
        split = on(model(), NAMED[name], MESHES[name])
        found = mx.generate(split, PROMPTS, max_new_tokens=NEW, logprobs=0, prefill_chunk=8, cache_dtype=cache_dtype)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.log_probs, expected.log_probs, **REPORTED)


def test_a_cache_dtype_that_does_not_fit_is_refused():
    small = talking_model(max_positions=64)
    prefix = mx.prefill(small, [1, 2])
    for call in (mx.generate, mx.stream, mx.score, functools.partial(mx.beam_search, num_beams=2)):
        with refused("cache_dtype is 'int4'", "'int8', 'float8_e4m3'"):
            call(small, [[1]], cache_dtype="int4")
    with refused("cache_dtype is ['int8']"):
        mx.prefill(small, [1], cache_dtype=["int8"])
    with refused("cache_dtype is 'bfloat16'", "'int8', 'float8_e4m3'"):
        mx.plan("gpt-mini", devices=1, cache_dtype="bfloat16")
    with refused("cache_dtype is 'fp8'"):
        mx.Conversation(small, cache_dtype="fp8")
    with refused("cache_dtype is 'int8'", "has floats", "mistral_eqx.prefill"):
        mx.generate(small, [[1]], prefix=prefix, cache_dtype="int8")


@pytest.mark.parametrize("cache_dtype", CODES)
@pytest.mark.slow
def test_keys_that_are_not_finite_are_refused(cache_dtype):
    small = talking_model()
    where = lambda model: model.blocks[0].attention.k_proj.weight.value  # noqa: E731
    broken = eqx.tree_at(where, small, replace_fn=lambda x: x.at[0, 0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="not finite"):
        mx.generate(broken, [[1, 2]], max_new_tokens=2, cache_dtype=cache_dtype)
