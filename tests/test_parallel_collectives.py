import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.sharding import mesh, sharded
from jax.sharding import PartitionSpec as P

from mistral_eqx.parallel import (
    SINGLE,
    Strategy,
    all_tokens,
    gather,
    pmax,
    pmin,
    psum,
    psum_together,
    psum_tokens,
    psum_varying,
    shard_index,
)
from mistral_eqx.parallel.mesh import make_mesh


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


def test_the_largest_and_the_smallest_of_all_devices():
    x, strategy = jnp.asarray([3.0, -1, 7, 2]), Strategy("vocab@tp")
    found, collectives = sharded(
        lambda x: (pmax(jnp.max(x), "vocab", strategy), pmin(jnp.min(x), "vocab", strategy)),
        mesh(2),
        (x,),
        (P("tp"),),
        (P(), P()),
    )
    assert (float(found[0]), float(found[1])) == (7, -1)
    assert collectives == {"all_reduce": 2}
    for same in (pmax, pmin):
        assert same(x, "vocab", SINGLE) is x
    # Nothing that is shifted by a maximum depends on it, so no gradient passes, and none is refused.
    gradient = jax.grad(lambda x: sharded_sum(x, strategy))(x)
    np.testing.assert_array_equal(gradient, np.ones(4))


def sharded_sum(x, strategy):
    def shifted(x):
        return psum(jnp.sum(x - pmax(jnp.max(x), "vocab", strategy)), "vocab", strategy)

    return jax.shard_map(shifted, mesh=make_mesh("tp=2"), in_specs=P("tp"), out_specs=P())(x)


def test_two_sums_go_in_one_exchange():
    first, second, strategy = jnp.arange(12.0).reshape(4, 3), jnp.arange(4.0).reshape(4, 1), Strategy("kv_seq@tp")

    def add(first, second):
        return psum_together(
            jnp.sum(first, axis=0, keepdims=True), jnp.sum(second, axis=0, keepdims=True), "kv_seq", strategy
        )

    found, collectives = sharded(add, mesh(2), (first, second), (P("tp"), P("tp")), (P(), P()))
    np.testing.assert_array_equal(found[0], [[18, 22, 26]])
    np.testing.assert_array_equal(found[1], [[6]])
    assert collectives == {"all_reduce": 1}
    together = psum_together(first, second, "kv_seq", SINGLE)
    assert together[0] is first
    assert together[1] is second


@pytest.mark.parametrize(
    ("layout", "axes", "seq", "collectives"),
    [
        ("hidden@a", "a=2", 6, {"all_reduce": 1}),
        ("hidden@a tokens@a", "a=2", 6, {"reduce_scatter": 1, "all_gather": 1}),
        # What cannot be dealt out evenly stays whole, and so does what one device has alone.
        ("hidden@a tokens@a", "a=2", 5, {"all_reduce": 1}),
        ("hidden@a tokens@a", "a=2", 1, {"all_reduce": 1}),
        ("hidden@a tokens@a", "a=1", 6, {"all_reduce": 1}),
        # Over the other axis it is added up before.
        ("hidden@a,b tokens@a", "a=2,b=2", 6, {"all_reduce": 1, "reduce_scatter": 1, "all_gather": 1}),
        ("hidden@a,b tokens@b,a", "a=2,b=2", 8, {"reduce_scatter": 1, "all_gather": 1}),
    ],
)
def test_tokens_are_dealt_out_and_put_together_again(layout, axes, seq, collectives):
    strategy, hidden = Strategy(layout), 4
    x = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (2, seq, hidden)), jnp.float32)

    def add(x):
        return all_tokens(psum_tokens(jnp.sum(x, axis=-1), "hidden", strategy), seq, strategy, to="invarying")

    found, made = sharded(add, make_mesh(axes), (x,), (strategy.spec("batch _ hidden"),), P())
    np.testing.assert_array_equal(found, x.sum(-1))
    assert made == collectives


def test_each_device_receives_its_own_tokens():
    strategy = Strategy("hidden@a,b tokens@b,a")
    x = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (1, 8, 4)), jnp.float32)
    found, _ = sharded(
        lambda x: psum_tokens(jnp.sum(x, axis=-1), "hidden", strategy),
        make_mesh("a=2,b=2"),
        (x,),
        (strategy.spec("batch _ hidden"),),
        strategy.spec("batch tokens"),
    )
    np.testing.assert_array_equal(found, x.sum(-1))
    assert {shard.data.shape for shard in found.addressable_shards} == {(1, 2)}


@pytest.mark.parametrize("layout", ["vocab@a", "vocab@a,b", "vocab@b,a"])
def test_parts_are_gathered_in_their_order(layout):
    strategy, x = Strategy(layout), jnp.arange(16.0).reshape(2, 8)
    grid = make_mesh("a=2,b=2")
    found, collectives = sharded(
        lambda x: gather(x, "vocab", strategy, axis=1), grid, (x,), (strategy.spec("batch vocab"),), P()
    )
    np.testing.assert_array_equal(found, x)
    assert collectives == {"all_gather": 1}
    assert gather(x, "vocab", SINGLE, axis=1) is x

    def number(x):
        part, parts = shard_index("vocab", strategy)
        return jnp.full((1, x.shape[1]), part * 10 + parts)

    found, _ = sharded(number, grid, (x[:1],), (strategy.spec("batch vocab"),), strategy.spec("batch vocab"))
    parts = grid.size if "," in layout else 2
    np.testing.assert_array_equal(found[0], np.repeat(np.arange(parts) * 10 + parts, 8 // parts))
    assert shard_index("vocab", SINGLE) == (0, 1)


def test_a_sum_over_the_devices_among_which_each_part_differs():
    """A weight that is split has squares everywhere, one that is not would be counted once a device."""
    grid, x, y, z = make_mesh("a=2,b=2"), jnp.arange(8.0), jnp.arange(4.0), jnp.asarray([5.0])
    found, collectives = sharded(
        lambda *parts: psum_varying([jnp.sum(part) for part in (*parts, parts[0])]),
        grid,
        (x, y, z),
        (P(("a", "b")), P("b"), P()),
        P(),
    )
    assert float(found) == 28 + 6 + 5 + 28
    assert collectives == {"all_reduce": 2}
    assert float(psum_varying([x[3], z[0]])) == 8
