import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharding_fixtures import mesh, sharded

from mistral_eqx.parallel import SINGLE, Strategy, psum


def test_psum_is_the_array_itself_if_nothing_is_split():
    x = jnp.ones(3)
    assert psum(x, "hidden", SINGLE) is x
    assert psum(x, "embed", Strategy("hidden@tp")) is x


@pytest.mark.parametrize("devices", [2, 4])
def test_psum_adds_up_over_the_axis_that_splits(devices):
    x = jnp.arange(8.0)
    found, collectives = sharded(
        lambda x: psum(jnp.sum(x), "hidden", Strategy("hidden@tp")), mesh(devices), (x,), (P("tp"),), P()
    )
    assert float(found) == 28
    assert collectives == {"all_reduce": 1}


def test_psum_over_two_axes_is_one_collective():
    grid = jax.make_mesh((2, 2), ("kv", "rep"), devices=jax.devices()[:4])
    x = jnp.arange(16.0).reshape(4, 4)
    strategy = Strategy("kv_heads@kv head_dim@rep")
    found, collectives = sharded(
        lambda x: psum(jnp.sum(x), "kv_heads head_dim", strategy), grid, (x,), (P("kv", "rep"),), P()
    )
    assert float(found) == 120
    assert collectives == {"all_reduce": 1}
    # Over one of the axes alone it is a sum of each column of devices.
    found, _ = sharded(lambda x: psum(jnp.sum(x), "kv_heads", strategy)[None], grid, (x,), (P("kv", "rep"),), P("rep"))
    np.testing.assert_array_equal(found, [np.sum(x[:, :2]), np.sum(x[:, 2:])])
