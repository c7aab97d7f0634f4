import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import numpy_reference as reference
from fixtures.model import relative_error
from fixtures.sharding import sharded
from hypothesis import given, settings, strategies as st
from jax.sharding import PartitionSpec as P

from mistral_eqx.nn import Rotation
from mistral_eqx.parallel import Strategy, make_mesh
from mistral_eqx.rope import Rope


THETA = 1e4


def _draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _turn(x, positions, theta=THETA):
    return Rotation.init(Rope(x.shape[-1], theta), jnp.asarray(positions))(jnp.asarray(x))


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("heads", [(), (3,), (3, 2)])
def test_pairs_of_adjacent_entries_are_turned_as_complex_numbers(theta, heads):
    x, positions = _draw(2, 4, *heads, 8), np.array([[0, 1, 2, 3], [5, 40, 7, 100]], np.int32)
    found = np.asarray(_turn(x, positions, theta))
    assert found.shape == x.shape
    for row, column, *head in np.ndindex(2, 4, *heads):
        at = (row, column, *head)
        expected = reference.rotate(x[at].astype(np.float64), positions[row, column], theta)
        np.testing.assert_allclose(found[at], expected, atol=2e-5)


def test_half_split_pairs_would_be_seen():
    x, positions = _draw(1, 1, 8), np.array([[3]], np.int32)
    interleaved = x.reshape(1, 1, 2, 4).swapaxes(2, 3).reshape(1, 1, 8)
    assert relative_error(_turn(interleaved, positions), reference.rotate(x[0, 0], 3, THETA)[None, None]) > 0.1


# One program for all examples.
@jax.jit
def _scores(q, k, positions):
    turn = functools.partial(Rotation.init, Rope(16, THETA))
    return jnp.einsum("bsd,bsd->bs", turn(positions[:, :1])(q), turn(positions[:, 1:])(k))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 100))
def test_scores_depend_on_the_distance_alone(query, key, shift, seed):
    q, k = _draw(1, 1, 16, seed=seed), _draw(1, 1, 16, seed=seed + 1000)
    here = _scores(q, k, jnp.asarray([[query, key]], jnp.int32))
    there = _scores(q, k, jnp.asarray([[query + shift, key + shift]], jnp.int32))
    # Angles of thousands of radians in float32.
    np.testing.assert_allclose(here, there, atol=2e-2)
    turned = reference.rotate(q[0, 0], query, THETA) @ reference.rotate(k[0, 0], key, THETA)
    np.testing.assert_allclose(here[0, 0], turned, atol=2e-2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30000), min_size=5, max_size=5))
def test_length_stays(positions):
    x = _draw(1, 5, 8)
    turned = _turn(x, np.array([positions], np.int32))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


def test_a_position_has_one_angle_wherever_its_token_stands():
    rotation = functools.partial(Rotation.init, Rope(8, THETA))
    whole = rotation(jnp.arange(20, dtype=jnp.int32)[None])
    for at in range(20):
        alone = rotation(jnp.asarray([[at]], jnp.int32))
        np.testing.assert_allclose(alone.cos[0, 0], whole.cos[0, at], atol=1e-7)
        np.testing.assert_allclose(alone.sin[0, 0], whole.sin[0, at], atol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_angles_of_16_bit_activations_are_float32(dtype):
    # In bfloat16 positions from 257 on would have no number of their own.
    x, positions = jnp.asarray(_draw(1, 1, 8), dtype), np.array([[1001]], np.int32)
    found = _turn(x, positions)
    assert found.dtype == dtype
    expected = reference.rotate(np.asarray(x[0, 0], np.float64), 1001, THETA)
    assert relative_error(found[0, 0], expected) < 2**-7


def test_frequencies():
    np.testing.assert_allclose(Rope(128, 1e6).inv_freq, [1e6 ** (-2 * pair / 128) for pair in range(64)], rtol=1e-15)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert Rotation.init(Rope(128, 1e6), jnp.zeros((1, 1), jnp.int32), dtype).cos.dtype == jnp.float32


def test_each_device_has_the_angles_of_its_part_of_a_head():
    strategy, positions = Strategy("head_dim@a,b"), jnp.arange(6, dtype=jnp.int32)[None]
    spec = strategy.spec("_ _ head_dim")

    def angles(positions):
        rotation = Rotation.init(Rope(16, THETA), positions, strategy=strategy)
        return rotation.cos, rotation.sin

    (cos, sin), collectives = sharded(angles, make_mesh("a=2,b=2"), (positions,), (P(),), (spec, spec))
    assert collectives == {}
    whole = Rotation.init(Rope(16, THETA), positions)
    np.testing.assert_allclose(cos, whole.cos, atol=1e-7)
    np.testing.assert_allclose(sin, whole.sin, atol=1e-7)
