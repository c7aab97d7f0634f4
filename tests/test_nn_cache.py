import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import SMALL, empty_cache, run, small_model

from mistral_eqx.nn import Cache, Context, FullCache


def _filled(batch=1, kv_seq=12):
    """A model, and its cache after four tokens."""
    model = small_model()
    ids = np.arange(4 * batch, dtype=np.int32).reshape(batch, 4)
    return model, run(model, ids, None, empty_cache(model, batch, kv_seq))[1]


def _copy(cache):
    return jax.tree.map(lambda leaf: np.array(leaf), cache)


def _assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_trap_one_stacked_array_made_everything_slow(dtype):
    """One entry a layer, each with two buffers `[batch, kv_heads, kv_seq, head_dim]`, that are updated on their own."""
    cache = Cache.init(SMALL, 3, 10, dtype)
    assert type(cache.layers) is tuple
    assert len(cache.layers) == SMALL.layers
    for layer in cache.layers:
        assert type(layer) is FullCache
        assert layer.k_buffer.numbers.shape == layer.v_buffer.numbers.shape == (3, SMALL.kv_heads, 10, SMALL.head_dim)
        assert layer.k.shape == layer.v.shape == (3, SMALL.kv_heads, 10, SMALL.head_dim)
        assert layer.k.dtype == layer.v.dtype == dtype
    assert cache.positions.shape == (3, 10)
    assert np.all(np.asarray(cache.positions) == -1)
    assert cache.kv_seq == 10
    # So are the model's weights: a loop over stacked ones would copy a layer's at each step.
    assert type(small_model().blocks) is tuple


def test_16_bit_buffers_hold_bits_on_a_cpu_only():
    for platform, stored in (("cpu", jnp.uint16), ("tpu", jnp.bfloat16), (None, jnp.uint16)):
        layer = Cache.init(SMALL, 1, 4, jnp.bfloat16, platform=platform).layers[0]
        assert layer.k_buffer.numbers.dtype == layer.v_buffer.numbers.dtype == stored
        assert layer.k.dtype == jnp.bfloat16
        new = jnp.asarray(
            np.random.default_rng(0).standard_normal((1, SMALL.kv_heads, 2, SMALL.head_dim)), jnp.bfloat16
        )
        cached = jnp.asarray([[0, -1, -1, -1]], jnp.int32), jnp.asarray(1, jnp.int32)
        context = Context.init(SMALL.rope, jnp.asarray([[1, 2]], jnp.int32), cached=cached)
        updated, k, v, index = layer.extend(new, -new, context)
        assert updated.k_buffer.numbers.dtype == stored
        np.testing.assert_array_equal(index, [[0, 1, 2, -1]])
        np.testing.assert_array_equal((k, v), (updated.k, updated.v))
        np.testing.assert_array_equal(updated.k[:, :, 1:3], new)
        np.testing.assert_array_equal(updated.v[:, :, 1:3], -new)
        np.testing.assert_array_equal(updated.k[:, :, [0, 3]], 0)


def test_trap_list_of_caches_aliased_between_beams():
    """Two continuations of one cache know nothing of each other."""
    model, cache = _filled()
    before = _copy(cache)
    first_token, second_token = (np.array([[token]], np.int32) for token in (7, 50))
    copies = [cache] * 2
    first_logits, copies[0] = run(model, first_token, None, copies[0])
    first = _copy(copies[0])
    second_logits, copies[1] = run(model, second_token, None, copies[1])
    _assert_equal(cache, before)
    _assert_equal(copies[0], first)
    assert np.any(np.asarray(copies[1].layers[0].k) != first.layers[0].k_buffer.numbers)
    # In the other order the tokens give the same.
    np.testing.assert_array_equal(run(model, second_token, None, cache)[0], second_logits)
    np.testing.assert_array_equal(run(model, first_token, None, cache)[0], first_logits)
    with pytest.raises(TypeError):
        cache.layers[0] = copies[0].layers[0]
    with pytest.raises(AttributeError):
        cache.used = jnp.zeros((), jnp.int32)


def test_no_two_buffers_are_one():
    leaves = jax.tree.leaves(Cache.init(SMALL, 2, 5))
    assert len(leaves) == 2 * SMALL.layers + 2
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_an_update_in_place_deletes_what_it_replaces():
    model, cache = _filled()
    donated = eqx.filter_jit(lambda kept, cache: kept[0].hidden(kept[1], None, cache)[1], donate="all-except-first")
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)]
    after = donated((model, jnp.zeros((1, 1), jnp.int32)), cache)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache.layers))
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.layers)] == pointers


def test_grow_keeps_what_was_read():
    model, cache = _filled(batch=2)
    grown = cache.grow(20)
    assert grown.kv_seq == 20
    assert int(grown.used) == 4
    np.testing.assert_array_equal(grown.positions[:, :12], cache.positions)
    assert np.all(np.asarray(grown.positions[:, 12:]) == -1)
    token = np.array([[7], [8]], np.int32)
    np.testing.assert_allclose(run(model, token, None, grown)[0], run(model, token, None, cache)[0], atol=1e-5)
    _assert_equal(cache.grow(12), cache)
    with pytest.raises(ValueError, match="cache of 12 slots cannot grow to 11; ask for at least as many"):
        cache.grow(11)


def test_keep_forgets_what_comes_after():
    model, cache = _filled()
    token = np.array([[9]], np.int32)
    kept = cache.keep(2)
    np.testing.assert_array_equal(kept.positions[0, :5], [0, 1, -1, -1, -1])
    np.testing.assert_array_equal(kept.next_positions, [2])
    expected, _ = run(model, np.array([[0, 1, 9]], np.int32), None, empty_cache(model, 1, 12))
    found, after = run(model, token, None, kept)
    np.testing.assert_allclose(found[:, 0], expected[:, 2], atol=1e-5)
    # Slots that were forgotten are not written again.
    np.testing.assert_array_equal(after.positions[0, :6], [0, 1, -1, -1, 2, -1])


def test_next_positions_of_rows_that_differ():
    cache = Cache.init(SMALL, 3, 4)
    cache = eqx.tree_at(
        lambda cache: cache.positions, cache, jnp.asarray([[-1, 0, 1, -1], [0, 1, 2, 3], [-1] * 4], jnp.int32)
    )
    np.testing.assert_array_equal(cache.next_positions, [2, 4, 0])
