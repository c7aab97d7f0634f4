"""Attention in tiles is attention."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import SMALL, relative_error, small_model
from hypothesis import given, settings, strategies as st

from mistral_eqx import PRESETS
from mistral_eqx.nn import Mistral, Span, attention as layer, attention_mask, flash_attention
from mistral_eqx.nn.kernels import flash
from mistral_eqx.nn.mask import bounds


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(flash, "TILE", 4)


def _inputs(draw, batch, kv_heads, q_per_kv, seq, kv_seq, head_dim=6):
    q = draw.standard_normal((batch, kv_heads, q_per_kv, seq, head_dim))
    k, v = draw.standard_normal((2, batch, kv_heads, kv_seq, head_dim))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def _whole(q, k, v, first, last, kv_positions, *, scale):
    """With all scores at once, and zeros for a query that sees nothing."""
    mask = attention_mask(first, last, kv_positions)[:, None, None]
    scores = jnp.where(mask, jnp.einsum("bhgqd,bhkd->bhgqk", q, k) * scale, -1e30)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0)
    log_sum = jnp.where(mask.any(axis=-1), jax.nn.logsumexp(scores, axis=-1), jnp.finfo(q.dtype).min)
    return jnp.einsum("bhgqk,bhkd->bhgqd", weights, v), log_sum


def _loss(function, arrays, seen):
    context, log_sum = function(*arrays, *seen, scale=0.4)
    # Both results have a part in it; a query that sees nothing gives no gradient.
    return jnp.sum(jnp.sin(context)) + jnp.sum(jnp.where(log_sum > -1e30, jnp.cos(log_sum), 0))


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 13), st.integers(1, 19), st.none() | st.integers(1, 9), st.booleans(), st.integers(0, 2**32 - 1))
def test_value_and_gradient_are_those_of_all_scores_at_once(seq, kv_seq, window, causal, seed):
    draw = np.random.default_rng(seed)
    arrays = _inputs(draw, 2, 2, 3, seq, kv_seq)
    positions = jnp.asarray(draw.integers(-1, 20, (2, seq)), jnp.int32)
    kv_positions = jnp.asarray(draw.integers(-1, 20, (2, kv_seq)), jnp.int32)
    ends = (jnp.asarray(x, jnp.int32) for x in draw.integers(-1, 20, (2, 2, seq)))
    seen = (*bounds(positions, window, None if causal else Span(*ends)), kv_positions)
    expected = _whole(*arrays, *seen, scale=0.4)
    found = jax.jit(functools.partial(flash_attention, scale=0.4))(*arrays, *seen)
    for one, other in zip(found, expected, strict=True):
        # Sums of at most 19 terms in float32, in another order.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)
    gradient = jax.jit(jax.grad(_loss, argnums=1), static_argnums=0)
    gradients = [gradient(function, arrays, seen) for function in (flash_attention, _whole)]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_a_model_says_the_same_in_tiles(monkeypatch, dtype):
    model = small_model(config=dataclasses.replace(SMALL, windows=(None, 5), layers=2), dtype=dtype)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab, (2, 23)), jnp.int32)
    forward = eqx.filter_jit(lambda model, ids: model(ids))
    expected = forward(model, ids)
    monkeypatch.setattr(layer, "_WHOLE", 0)
    found = eqx.filter_jit(lambda model, ids: model(ids))(model, ids)
    assert relative_error(found, expected) < (2e-6 if dtype == "float32" else 2**-6)


def test_tiles_that_nobody_sees_are_passed_over(monkeypatch):
    """Counted at run time: causal, half of the tiles and the diagonal; in a window, a stripe."""
    seen = []
    original = flash._touches

    def spied(*arguments):
        touches = original(*arguments)
        jax.debug.callback(lambda touches: seen.append(bool(touches)), touches)
        return touches

    monkeypatch.setattr(flash, "_touches", spied)
    positions = jnp.arange(32, dtype=jnp.int32)[None]
    arrays = _inputs(np.random.default_rng(0), 1, 1, 1, 32, 32)
    for window, expected in ((None, 8 * 9 // 2), (5, 8 + 7), (1, 8)):
        seen.clear()
        jax.block_until_ready(flash_attention(*arrays, *bounds(positions, window), positions, scale=1.0))
        jax.effects_barrier()
        assert (len(seen), sum(seen)) == (64, expected)


@pytest.mark.slow
def test_a_long_prompt_needs_no_score_for_every_pair(monkeypatch):
    monkeypatch.undo()
    config = dataclasses.replace(SMALL, layers=2, windows=(None, None), max_positions=8192)
    model, ids = small_model(config=config), jnp.zeros((1, 8192), jnp.int32)
    heads, scores = config.kv_heads * config.q_per_kv, 4 * 8192**2

    def loss(model, ids):
        return jnp.mean(model.hidden(ids)[0])

    compiled = eqx.filter_jit(loss).lower(model, ids).compile().compiled
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 8
    backward = eqx.filter_jit(eqx.filter_grad(loss)).lower(model, ids).compile().compiled
    assert backward.memory_analysis().temp_size_in_bytes < heads * scores / 8


@pytest.mark.slow
def test_a_prompt_of_8192_takes_less_than_one_heads_scores_in_the_shape_of_smollm2(monkeypatch):
    monkeypatch.undo()
    config = dataclasses.replace(PRESETS["smollm2-135m"], layers=2, windows=(None, None))
    assert config.max_positions == 8192
    model, ids = Mistral.init(config, key=jax.random.key(0)), jnp.zeros((1, 8192), jnp.int32)

    def forward(model, ids):
        return model.hidden(ids)[0][:, -1]

    compiled = eqx.filter_jit(forward).lower(model, ids).compile().compiled
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 8192**2
