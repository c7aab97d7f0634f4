import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import relative_error
from fixtures.sharding import mesh, sharded
from jax.sharding import PartitionSpec as P

from mistral_eqx.nn import DenseWeight, Linear
from mistral_eqx.parallel import Strategy, specs, with_strategy


HEADS = "kv_heads q_per_kv head_dim"


def _draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _column(layout=""):
    """From `embed` to the heads."""
    return Linear(DenseWeight(_draw(4, 3, 8, 24)), "embed", HEADS, Strategy(layout))


def _row(layout=""):
    """From the heads to `embed`."""
    return Linear(DenseWeight(_draw(24, 4, 3, 8)), HEADS, "embed", Strategy(layout))


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("dim", ["kv_heads", "head_dim"])
def test_column_parallel_exchanges_nothing(devices, dim):
    linear, x = _column(f"{dim}@tp"), _draw(2, 5, 24, seed=1)
    out = linear.strategy.spec(f"batch seq {HEADS}")
    assert "tp" in out
    y, collectives = sharded(Linear.__call__, mesh(devices), (linear, x), (specs(linear, linear.strategy), P()), out)
    assert collectives == {}
    assert relative_error(y, _column()(x)) < 1e-6
    assert y.addressable_shards[0].data.size == y.size // devices


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("dim", ["kv_heads", "head_dim"])
def test_row_parallel_adds_up_once(devices, dim):
    linear, x = _row(f"{dim}@tp"), _draw(2, 5, 4, 3, 8, seed=1)
    in_specs = (specs(linear, linear.strategy), linear.strategy.spec(f"batch seq {HEADS}"))
    y, collectives = sharded(Linear.__call__, mesh(devices), (linear, x), in_specs, P())
    assert collectives == {"all_reduce": 1}
    assert relative_error(y, _row()(x)) < 1e-6


def test_row_parallel_over_two_axes_adds_up_once():
    linear, x = _row("kv_heads@kv head_dim@rep"), _draw(2, 5, 4, 3, 8, seed=1)
    grid = jax.make_mesh((2, 2), ("kv", "rep"), devices=jax.devices()[:4])
    in_specs = (specs(linear, linear.strategy), linear.strategy.spec(f"batch seq {HEADS}"))
    y, collectives = sharded(Linear.__call__, grid, (linear, x), in_specs, P())
    assert collectives == {"all_reduce": 1}
    assert relative_error(y, _row()(x)) < 1e-6


@pytest.mark.parametrize("make", [_column, _row])
def test_one_device_exchanges_nothing(make):
    linear = make()
    x = _draw(2, 5, *((24,) if make is _column else (4, 3, 8)), seed=1)
    assert "all_reduce" not in jax.jit(lambda x: linear(x)).lower(x).as_text()


def test_trap_sharding_that_silently_does_nothing():
    """On virtual CPU devices too, each device has its part alone, and a sum that is left out is noticed."""
    seen = []

    def look(linear, x):
        seen.append((linear.weight.value.shape, x.shape))
        return linear(x)

    linear, x = _row("kv_heads@tp"), _draw(2, 5, 4, 3, 8, seed=1)
    in_specs = (specs(linear, linear.strategy), linear.strategy.spec(f"batch seq {HEADS}"))
    sharded(look, mesh(4), (linear, x), in_specs, P())
    assert set(seen) == {((24, 1, 3, 8), (2, 5, 1, 3, 8))}
    # A layer that was not told its strategy leaves a partial sum, which may not leave the map as a whole one.
    forgotten = with_strategy(linear, Strategy())
    with pytest.raises(ValueError, match="require replication"):
        sharded(look, mesh(4), (forgotten, x), in_specs, P())
    weight = jax.device_put(
        linear.weight.value, jax.NamedSharding(mesh(4), specs(linear, linear.strategy).weight.value)
    )
    assert len({shard.device for shard in weight.addressable_shards}) == 4
    assert all(shard.data.shape == (24, 1, 3, 8) for shard in weight.addressable_shards)


@pytest.mark.parametrize("devices", [2, 4])
def test_gradients_inside_the_map_are_those_of_one_device(devices):
    column, row, x = _column("kv_heads@tp"), _row("kv_heads@tp"), _draw(2, 5, 24, seed=1)

    def loss(layers, x):
        return jnp.sum(layers[1](layers[0](x)) ** 2)

    def gradients(layers, x):
        values = jax.grad(lambda values, x: loss(_filled(layers, values), x), argnums=(0, 1))
        return values(tuple(layer.weight.value for layer in layers), x)

    layers = (column, row)
    split = tuple(specs(layer, layer.strategy).weight.value for layer in layers)
    found, _ = sharded(gradients, mesh(devices), (layers, x), (specs(layers, layers[0].strategy), P()), (split, P()))
    expected = gradients((_column(), _row()), x)
    jax.tree.map(lambda one, other: _assert_close(one, other), found, expected)


@pytest.mark.parametrize("make", [_column, _row])
@pytest.mark.parametrize("layout", ["", "kv_heads@tp", "head_dim@tp embed@dp", "kv_heads@kv q_per_kv@rep"])
def test_dims_give_a_spec_of_the_right_rank(make, layout):
    linear = make(layout)
    dims = linear.weight.dims(linear.in_dims, linear.out_dims)
    assert dims.keys() == {field.name for field in dataclasses.fields(linear.weight)}
    for field, names in dims.items():
        array = getattr(linear.weight, field)
        spec = linear.strategy.spec(names)
        assert len(spec) == array.ndim
        for axis, name in zip(spec, names.split(), strict=True):
            assert (axis is None) == (f"{name}@" not in layout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_result_has_the_precision_of_the_activations(dtype):
    linear = Linear(DenseWeight(_draw(6, 4, dtype=dtype)), "embed", "hidden")
    assert linear(_draw(1, 2, 4, dtype=dtype)).dtype == dtype


def _filled(layers, values):
    return tuple(
        dataclasses.replace(layer, weight=DenseWeight(value)) for layer, value in zip(layers, values, strict=True)
    )


def _assert_close(found, expected):
    assert relative_error(found, expected) < 1e-6
