import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import numpy_reference as reference
from fixtures.model import SMALL, relative_error, small_model
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from mistral_eqx.nn import Cache, Context, attention_mask
from mistral_eqx.nn.mask import bounds


GROUPED = dataclasses.replace(SMALL, layers=1, windows=(None,), kv_heads=3, q_per_kv=4)
POSITIONS = np.arange(7)


def _attention(config=GROUPED, dtype=jnp.float32):
    return small_model(config=config, dtype=dtype).blocks[0].attention


def _activations(rows=7):
    return np.random.default_rng(5).standard_normal((rows, SMALL.embed))


@eqx.filter_jit
def _apply(attention, rope, x, positions):
    """The layer without a cache, on activations of shape `(seq, embed)`."""
    return attention(x[None], Context.init(rope, positions[None], dtype=x.dtype))[0][0]


def _run(attention, x, positions=POSITIONS, dtype=jnp.float32):
    x, positions = jnp.asarray(x, dtype), jnp.asarray(positions, jnp.int32)
    return np.asarray(_apply(attention, GROUPED.rope, x, positions), np.float64)


_positions = st.integers(-1, 12)


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.int32, (2, 3), elements=_positions),
    hnp.arrays(np.int32, (2, 5), elements=_positions),
    st.none() | st.integers(1, 14),
)
def test_visible_is_what_its_words_say(positions, kv_positions, window):
    found = attention_mask(*bounds(jnp.asarray(positions), window), jnp.asarray(kv_positions))
    assert found.shape == (2, 3, 5)
    for row, query, key in np.ndindex(2, 3, 5):
        expected = reference.sees(positions[row, query], kv_positions[row, key], window)
        assert bool(found[row, query, key]) == expected


def test_a_window_is_that_of_transformers():
    positions = jnp.arange(10, dtype=jnp.int32)[None]
    count = np.sum(attention_mask(*bounds(positions, 4), positions), axis=-1)[0]
    np.testing.assert_array_equal(count, [1, 2, 3, 4, 4, 4, 4, 4, 4, 4])


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("kv_heads", "q_per_kv", "head_dim"), [(1, 1, 2), (4, 1, 6), (1, 5, 8), (2, 3, 10)])
@pytest.mark.slow
def test_is_that_of_numpy_head_by_head(kv_heads, q_per_kv, head_dim, window):
    attention = _attention(
        dataclasses.replace(GROUPED, kv_heads=kv_heads, q_per_kv=q_per_kv, head_dim=head_dim, windows=(window,))
    )
    # Padding in the middle and at an end, and a jump.
    positions = np.array([0, 1, -1, 2, 3, 9, 10, -1])
    x = _activations(8)
    found = np.asarray(
        _apply(
            attention,
            dataclasses.replace(GROUPED, head_dim=head_dim).rope,
            jnp.asarray(x, jnp.float32),
            jnp.asarray(positions, jnp.int32),
        )
    )
    expected = reference.attention(attention, x, positions, theta=GROUPED.rope_theta)
    real = positions >= 0
    assert relative_error(found[real], expected[real]) < 2e-6
    assert np.isfinite(found).all()


def test_trap_wrong_d_k_in_the_scale():
    attention, x = _attention(), _activations()
    assert attention.scale == pytest.approx(8**-0.5)
    found = _run(attention, x)
    assert relative_error(found, reference.attention(attention, x, POSITIONS, theta=1e4, scale=8**-0.5)) < 2e-6
    # Neither embed / heads, nor embed, nor the width of all heads.
    for wrong in (24 / 12, 24, 8 * 12, 1):
        other = reference.attention(attention, x, POSITIONS, theta=1e4, scale=wrong**-0.5)
        assert relative_error(found, other) > 0.05


def test_trap_axis_order_that_leaves_the_first_and_last_rows_right_and_the_middle_wrong():
    """Each query head reads its own group's keys and values, seen head by head.

    With heads in another order the first and the last would still be right: `tile` in place of `repeat`.
    """
    attention, x = _attention(), _activations()
    right = reference.heads(attention, x, POSITIONS, theta=1e4)
    tiled = reference.heads(
        attention, x, POSITIONS, theta=1e4, kv_head_of=lambda group, member: (group * 4 + member) % 3
    )
    for group, member in np.ndindex(3, 4):
        # An output layer that shows one head's entries as they are.
        shown = np.zeros((SMALL.embed, 3, 4, 8))
        shown[np.arange(8), group, member, np.arange(8)] = 1
        one = eqx.tree_at(lambda tree: tree.o_proj.weight.value, attention, jnp.asarray(shown, jnp.float32))
        found = _run(one, x)[:, :8]
        assert relative_error(found, right[:, group, member]) < 2e-6
        same = (group * 4 + member) % 3 == group
        assert same or relative_error(found, tiled[:, group, member]) > 0.05
    assert np.array_equal(tiled[:, 0, 0], right[:, 0, 0])
    assert np.array_equal(tiled[:, -1, -1], right[:, -1, -1])


def test_query_heads_are_exchanged_within_a_group_only():
    attention, x = _attention(), _activations()
    weights = lambda tree: (tree.q_proj.weight.value, tree.o_proj.weight.value)  # noqa: E731

    def exchanged(first, second):
        q, o = (np.array(value) for value in weights(attention))
        q[first], q[second] = q[second].copy(), q[first].copy()
        o[:, *first], o[:, *second] = o[:, *second].copy(), o[:, *first].copy()
        return _run(eqx.tree_at(weights, attention, (jnp.asarray(q), jnp.asarray(o))), x)

    expected = _run(attention, x)
    assert relative_error(exchanged((1, 0), (1, 3)), expected) < 2e-6
    assert relative_error(exchanged((1, 0), (2, 0)), expected) > 0.05


def test_trap_sizes_as_globals_the_layer_runs_on_part_of_its_heads():
    """What each half of the key/value heads gives adds up to the whole, and so does each half of `q_per_kv`."""
    attention, x = _attention(dataclasses.replace(GROUPED, kv_heads=4)), _activations()
    whole = _run(attention, x)

    def part(kv_heads, q_per_kv=slice(None)):
        values = lambda tree: [  # noqa: E731
            linear.weight.value for linear in (tree.q_proj, tree.k_proj, tree.v_proj, tree.o_proj)
        ]
        q, k, v, o = values(attention)
        parts = q[kv_heads, q_per_kv], k[kv_heads], v[kv_heads], o[:, kv_heads, q_per_kv]
        return _run(eqx.tree_at(values, attention, list(parts)), x)

    assert relative_error(part(slice(2)) + part(slice(2, None)), whole) < 2e-6
    assert relative_error(part(slice(1)) + part(slice(1, None)), whole) < 2e-6
    everything = slice(None)
    assert relative_error(part(everything, slice(1)) + part(everything, slice(1, None)), whole) < 2e-6
    assert relative_error(part(slice(2)), whole) > 0.05


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 2**-5), ("float16", 2**-8)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.slow
def test_one_query_on_a_cache_is_the_last_row_of_many(dtype, bound, batch):
    """One query takes another way through XLA on CPU than several do."""
    model = small_model(config=GROUPED, dtype=dtype)
    attention, x = model.blocks[0].attention, jnp.asarray(_activations(), dtype)
    x = jnp.broadcast_to(x[None], (batch, *x.shape))
    positions = jnp.broadcast_to(jnp.asarray(POSITIONS, jnp.int32), (batch, len(POSITIONS)))

    @jax.jit
    def last(x):
        cache = Cache.init(GROUPED, batch, 9, dtype)
        (layer,), known = cache.layers, cache.positions
        for at in (slice(6), slice(6, 7)):
            slot = jnp.asarray(at.start or 0, jnp.int32)
            context = Context.init(GROUPED.rope, positions[:, at], dtype=dtype, cached=(known, slot))
            (y, layer), known = attention(x[:, at], context, layer), context.key_index
        return y[:, 0]

    expected = reference.attention(attention, np.asarray(x[0], np.float64), POSITIONS, theta=1e4)[-1]
    for row in last(x):
        assert row.dtype == dtype
        assert relative_error(row, expected) < bound
