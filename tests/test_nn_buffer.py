"""Keys and values that are rounded to 8 bits, against numpy and ml_dtypes."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fixtures.generation import refused
from fixtures.model import SMALL
from fixtures.sharding import mesh, sharded
from jax.sharding import PartitionSpec as P

from mistral_eqx.nn import Buffer, Cache, Context
from mistral_eqx.parallel import HEAD_DIM, SINGLE


CODES = {"int8": np.arange(-127, 128.0), "float8_e4m3": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)}
SHAPE = 2, 3, 5, 8
# Scale, quotient and product each round by half of float32's eps, of numbers up to 448 steps.
SLACK = 3 * 448 * 2**-24


def exact(cache_dtype, shape=SHAPE):
    """Vectors with any codes, one of them the largest, times a power of two."""
    draw = np.random.default_rng(0)
    codes = CODES[cache_dtype].astype(np.float32)
    codes = codes[np.isfinite(codes)]
    numbers = draw.choice(codes, shape)
    numbers[..., 0] = codes.max()
    return numbers * np.float32(2.0) ** draw.integers(-6, 7, (*shape[:-1], 1))


def drawn(shape=SHAPE):
    """Normal numbers of many sizes, with a vector of zeros."""
    draw = np.random.default_rng(1)
    numbers = draw.standard_normal(shape) * 10.0 ** draw.integers(-8, 8, (*shape[:-1], 1))
    numbers[0, 0, 0] = 0
    return jnp.asarray(numbers, jnp.float32)


def stored(new, cache_dtype, strategy=SINGLE):
    return Buffer.init(new.shape, new.dtype, cache_dtype).like(new, strategy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cache_dtype", CODES)
def test_numbers_that_codes_can_hold_are_kept(cache_dtype, dtype):
    new = jnp.asarray(exact(cache_dtype), dtype)
    found = stored(new, cache_dtype)
    assert found.floats.dtype == dtype
    np.testing.assert_array_equal(found.floats, new)


def test_integers_are_within_half_a_step():
    new = drawn()
    found = stored(new, "int8")
    scales = np.abs(new).max(axis=-1) / 127
    np.testing.assert_allclose(found.scales, np.where(scales == 0, 1, scales), rtol=2**-23)
    steps = np.abs(found.floats - new) / np.asarray(found.scales)[..., None]
    assert 0.4 < steps.max() <= 0.5 + SLACK
    assert np.abs(found.numbers).max() == 127


def test_fp8_codes_are_those_of_ml_dtypes():
    new = drawn()
    found = stored(new, "float8_e4m3")
    ratio = np.asarray(new) / np.asarray(found.scales)[..., None]
    codes = np.asarray(found.numbers).view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(codes, ratio.astype(ml_dtypes.float8_e4m3fn))
    # Three bits of mantissa, and a smallest step of 2 ** -9.
    error = np.abs(found.floats - new) / np.asarray(found.scales)[..., None]
    assert np.all(error <= np.maximum(np.abs(ratio) * 2**-4, 2**-10) + SLACK)
    assert np.nanmax(codes.astype(np.float32)) == 448


@pytest.mark.parametrize("cache_dtype", CODES)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(cache_dtype, wrong):
    new = drawn().at[1, 2, 3, 4].set(wrong)
    floats = np.array(stored(new, cache_dtype).floats)
    assert not np.isfinite(floats[1, 2, 3]).all()
    floats[1, 2, 3] = 0
    assert np.isfinite(floats).all()


@pytest.mark.parametrize("cache_dtype", CODES)
def test_a_scale_is_that_of_the_whole_vector_where_head_dim_is_split(cache_dtype):
    new, split = drawn(), HEAD_DIM.spec("batch kv_heads kv_seq head_dim")

    def numbers_and_scales(new):
        found = stored(new, cache_dtype, HEAD_DIM)
        return found.numbers, found.scales

    found, collectives = sharded(numbers_and_scales, mesh(4), (new,), (split,), (split, P()))
    expected = stored(new, cache_dtype)
    assert collectives == {"all_reduce": 1}
    jax.tree.map(np.testing.assert_array_equal, found, (expected.numbers, expected.scales))


@eqx.filter_jit
def extend(layers, k, v, start):
    """Adds keys and values to each layer."""
    slots, new = jnp.arange(12, dtype=jnp.int32), jnp.arange(k.shape[2], dtype=jnp.int32)
    before = jnp.where(slots < start, slots, -1)
    positions = jnp.broadcast_to(start + new, (k.shape[0], k.shape[2]))
    context = Context.init(SMALL.rope, positions, cached=(jnp.broadcast_to(before, (k.shape[0], 12)), start))
    return [layer.extend(k, v, context) for layer in layers]


@pytest.mark.parametrize("cache_dtype", CODES)
def test_a_layer_with_numbers_that_codes_can_hold_is_one_of_floats(cache_dtype):
    """With and without a window: longer than it, in one pass and token by token, and grown in between."""
    shape = 2, SMALL.kv_heads, 9, SMALL.head_dim
    k = exact(cache_dtype, shape)
    k, v = (jnp.asarray(x) for x in (k, k[:, ::-1].copy()))
    config = dataclasses.replace(SMALL, windows=(None, 3))
    caches = [Cache.init(config, 2, 6, cache_dtype=one, chunk=2) for one in (None, cache_dtype)]
    layers, start = [layer for cache in caches for layer in cache.layers], 0
    for count in (2, 1, 1, 2, 1, 2):
        if start == 4:
            layers = [layer.grow(12) for layer in layers]
        stop = start + count
        results = extend(layers, k[:, :, start:stop], v[:, :, start:stop], jnp.asarray(start, jnp.int32))
        layers = [layer for layer, *_ in results]
        for (_, *expected), (_, *found) in zip(results[:2], results[2:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, found, expected)
        start = stop


@pytest.mark.parametrize("cache_dtype", CODES)
def test_the_size_is_a_quarter_of_float32_and_the_scales(cache_dtype):
    caches = Cache.init(SMALL, 3, 16), Cache.init(SMALL, 3, 16, cache_dtype=cache_dtype)
    floats, codes = (sum(x.nbytes for x in jax.tree.leaves(cache.layers)) for cache in caches)
    assert codes == floats / 4 + floats / SMALL.head_dim


def test_a_wrong_cache_dtype_is_refused():
    with refused("cache_dtype is 'int4'; it must be one of 'int8', 'float8_e4m3'."):
        Cache.init(SMALL, 1, 4, cache_dtype="int4")
