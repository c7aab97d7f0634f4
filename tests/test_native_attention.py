"""Attention by the C++ kernel, compared with the same in plain JAX."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.cases import every_third
from fixtures.checkpoint import tiny

import mistral_eqx as mx
from mistral_eqx.nn.kernels import attention, native


pytestmark = pytest.mark.skipif(native.instructions() is None, reason="The C++ kernels were not built.")

# Sums of float32 in another order: of up to 128 products, then of up to 777 weights.
CLOSE = {"rtol": 1e-5, "atol": 3e-6}


def inputs(batch=2, seq=1, kv_heads=2, group=3, head_dim=64, slots=37, dtype=jnp.float32, seed=0):
    keys = jr.split(jr.key(seed), 4)
    q = jr.normal(keys[0], (batch, seq, kv_heads, group, head_dim), dtype)
    k, v = (jr.normal(key, (batch, kv_heads, slots, head_dim), dtype) for key in keys[1:3])
    return q, k, v, jr.bernoulli(keys[3], 0.7, (batch, seq, slots)).at[:, :, 0].set(True)


def plain(q, k, v, mask, scale):
    """Softmax attention, all in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bshgd,bhkd->bshgk", q, k) * scale
    scores = jnp.where(mask[:, :, None, None], scores, -jnp.inf)
    log_sum = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    return jnp.einsum("bshgk,bhkd->bshgd", jnp.exp(scores - log_sum), v), log_sum


@pytest.mark.parametrize("dtype", every_third([jnp.float32, jnp.bfloat16, jnp.float16]))
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"batch": 1, "group": 1, "slots": 1},
        {"seq": 5, "group": 4, "head_dim": 128, "slots": 300},
        {"seq": 8, "group": 5, "head_dim": 16, "slots": 256},
        {"kv_heads": 1, "group": 8, "head_dim": 80, "slots": 777},
    ],
)
def test_kernel_computes_softmax_attention(sizes, dtype):
    q, k, v, mask = inputs(**sizes, dtype=dtype)
    found = jax.jit(functools.partial(attention, scale=0.3))(q, k, v, mask)
    assert "mistral_eqx_attend" in jax.jit(functools.partial(attention, scale=0.3)).lower(q, k, v, mask).as_text()
    for ours, theirs in zip(found, plain(q, k, v, mask, 0.3), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_row_does_not_depend_on_the_others():
    q, k, v, mask = inputs(batch=3, slots=300)
    together, _ = attention(q, k, v, mask, scale=0.3)
    for row in range(3):
        alone, _ = attention(q[row : row + 1], k[row : row + 1], v[row : row + 1], mask[row : row + 1], scale=0.3)
        np.testing.assert_array_equal(alone, together[row : row + 1])


def test_query_that_attends_to_nothing_is_finite():
    q, k, v, mask = inputs()
    mixed, log_sum = attention(q, k, v, mask.at[0].set(False), scale=0.3)
    np.testing.assert_array_equal(mixed[0], 0)
    np.testing.assert_array_equal(log_sum[0], jnp.finfo(jnp.float32).min)
    assert jnp.isfinite(mixed).all()


def test_nan_is_not_hidden_and_stays_in_its_row():
    q, k, v, mask = inputs()
    mixed, _ = attention(q, k.at[0, 0, 0, 3].set(jnp.nan), v, mask, scale=0.3)
    assert jnp.isnan(mixed[0, :, 0]).all()
    assert jnp.isfinite(mixed[1]).all()
    hidden, _ = attention(q, k.at[0, 0, 5].set(jnp.nan), v, mask.at[:, :, 5].set(False), scale=0.3)
    assert jnp.isfinite(hidden).all()


def test_scores_far_apart_do_not_overflow():
    q, k, v, mask = inputs(slots=600)
    np.testing.assert_allclose(
        attention(q * 300, k, v, mask, scale=1.0)[0], plain(q * 300, k, v, mask, 1.0)[0], rtol=1e-3, atol=1e-3
    )


def test_gradients_are_those_of_plain_jax():
    q, k, v, mask = inputs(seq=2)

    def loss(function, q, k, v):
        mixed, log_sum = function(q, k, v, mask, scale=0.3)
        return jnp.sum(mixed**2) + jnp.sum(log_sum)

    found = jax.grad(functools.partial(loss, attention), argnums=(0, 1, 2))(q, k, v)
    for ours, theirs in zip(found, jax.grad(functools.partial(loss, plain), argnums=(0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_kernel_reads_a_16_bit_cache_where_it_is(getkey):
    config = tiny(head_dim=16)
    model = mx.Mistral.init(config, key=getkey(), dtype=jnp.bfloat16)
    cache = mx.nn.Cache.init(config, 1, 512, jnp.bfloat16)
    arrays, static = eqx.partition(model, eqx.is_array)
    step = jax.jit(lambda arrays, cache, ids: eqx.combine(arrays, static).hidden(ids, None, cache), donate_argnums=1)
    program = step.lower(arrays, cache, jnp.zeros((1, 1), jnp.int32)).compile().as_text()
    assert "mistral_eqx_attend" in program
    # Its bits are updated in place, and nothing of its size is written as floats.
    assert "u16[1,2,512,16]" in program
    assert "bf16[1,2,512,16]" not in program


@pytest.mark.parametrize("cache_dtype", ["int8", "float8_e4m3"])
def test_codes_of_a_quantized_cache_are_read(cache_dtype):
    q, k, v, mask = inputs(slots=300, group=5, seq=2)
    scaled = (x * jnp.exp(jnp.arange(300.0) % 7 - 3)[None, None, :, None] for x in (k, v))
    k, v = (mx.nn.Buffer.init(k.shape, jnp.float32, cache_dtype).like(x, mx.SINGLE) for x in scaled)
    codes = k.numbers, v.numbers, k.scales, v.scales
    found = jax.jit(functools.partial(attention, scale=0.01))(q, k.floats, v.floats, mask, codes=codes)
    for ours, theirs in zip(found, plain(q, k.floats, v.floats, mask, 0.01), strict=True):
        # Values are up to 20 times as large as those of the other tests.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=20 * CLOSE["atol"])


def test_shapes_that_do_not_fit_are_refused_by_the_library():
    q, k, v, mask = inputs()
    codes = k.astype(jnp.int8), v.astype(jnp.int8)
    scales = jnp.ones(k.shape[:3]), jnp.ones(k.shape[:3])
    # Without the annotations, which refuse such shapes first.
    call = inspect.unwrap(native.attend)
    for bad in (
        (q[:1], k, v, mask),
        (q, k[:, :1], v, mask),
        (q, k, v[:, :, :-1], mask),
        (q, k, v, mask[..., :-1]),
        (q[..., :4], k[..., :4], v[..., :4], mask),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
            jax.block_until_ready(call(*bad, scale=1.0))
    for some in (None, (scales[0][..., :-1], scales[1])):
        with pytest.raises(jax.errors.JaxRuntimeError, match="a scale for each slot"):
            jax.block_until_ready(call(q, *codes, mask, some, scale=1.0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no attention for the precision"):
        jax.block_until_ready(call(q, k.astype(jnp.int32), v.astype(jnp.int32), mask, scale=1.0))


def test_every_float8_is_read():
    # Each slot has one code in all entries, and each query attends to one slot.
    codes = jnp.asarray([code for code in range(256) if code & 0x7F != 0x7F], jnp.uint8)
    numbers = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    slots = len(codes)
    v = jnp.broadcast_to(codes[:, None, None, None], (slots, 1, 1, 16))
    k, ones = jnp.zeros_like(v), jnp.ones((slots, 1, 1))
    mixed, _ = native.attend(
        jnp.ones((slots, 1, 1, 1, 16)), k, v, jnp.ones((slots, 1, 1), bool), (ones, ones), scale=1.0
    )
    np.testing.assert_array_equal(mixed[:, 0, 0, 0], jnp.broadcast_to(numbers[:, None], (slots, 16)))


def test_a_program_with_a_quantized_cache_dequantizes_nothing(getkey):
    config = tiny(head_dim=16)
    model = mx.Mistral.init(config, key=getkey())
    cache = mx.nn.Cache.init(config, 1, 512, jnp.float32, cache_dtype="int8")
    arrays, static = eqx.partition(model, eqx.is_array)
    step = jax.jit(lambda arrays, cache, ids: eqx.combine(arrays, static).hidden(ids, None, cache), donate_argnums=1)
    program = step.lower(arrays, cache, jnp.zeros((1, 1), jnp.int32)).compile().as_text()
    assert "s8[1,2,512,16]" in program
    assert "f32[1,2,512,16]" not in program
