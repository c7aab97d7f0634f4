import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.sharding import sharded
from hypothesis import given, settings, strategies as st
from jax.sharding import PartitionSpec as P

from mistral_eqx.nn.slots import own_slot, own_slots, slots_for, tokens_in
from mistral_eqx.parallel import SINGLE, Strategy, make_mesh


def _write(caches, tokens, start, parts):
    """What `own_slots` and `own_slot` mean: slot `i` belongs to device `i % parts`."""
    for number, token in enumerate(tokens):
        slot = start + number
        caches[slot % parts][slot // parts] = token


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["kv_seq@a", "kv_seq@a,b", "kv_seq@b,a"]),
    st.sampled_from(["a=2,b=1", "a=3,b=2", "a=2,b=4"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_slots_are_dealt_out_in_turn(layout, axes, pieces):
    strategy, grid = Strategy(layout), make_mesh(axes)
    parts = int(np.prod([grid.shape[axis] for axis in strategy.axes("kv_seq")]))
    total = sum(pieces)
    share = -(-total // parts) + 1
    tokens = jnp.arange(1, total + 1, dtype=jnp.int32)[None]

    def write(cache, tokens):
        start = 0
        for piece in pieces:
            slot = jnp.asarray(start, jnp.int32)
            own = own_slots(tokens[:, start : start + piece], slot, strategy, axis=1, fill=-1)
            assert own.shape == (1, -(-piece // parts))
            cache = jax.lax.dynamic_update_slice_in_dim(cache, own, own_slot(slot, strategy), axis=1)
            start += piece
        return cache

    empty = jnp.zeros((1, parts * share), jnp.int32)
    spec = strategy.spec("batch kv_seq")
    found, collectives = sharded(write, grid, (empty, tokens), (spec, P()), spec)
    expected = np.zeros((parts, share), np.int32)
    _write(expected, range(1, total + 1), 0, parts)
    found = np.asarray(found).reshape(parts, share)
    # A slot that is still free may hold padding.
    np.testing.assert_array_equal(np.maximum(found, 0), expected)
    assert collectives == {}


def test_one_device_has_all_slots():
    x, slot = jnp.ones((1, 3)), jnp.asarray(5, jnp.int32)
    assert own_slots(x, slot, SINGLE, axis=1) is x
    assert own_slot(slot, SINGLE) is slot


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 7, 8, 100, 1000])
def test_a_cache_has_room_for_its_tokens(tokens, shards):
    kv_seq = slots_for(tokens, shards)
    assert tokens_in(kv_seq, shards) >= tokens
    assert kv_seq % shards == 0
    assert shards == 1 or kv_seq // shards % 8 == 0
    # What the deal of the slots asks for: the share of the tokens, and one slot more.
    assert shards == 1 or kv_seq // shards >= -(-tokens // shards) + 1
