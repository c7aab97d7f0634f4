"""What is exchanged and multiplied, read from programs whose answers can be counted by hand."""

import jax
import jax.numpy as jnp

import mistral_eqx as mx
from mistral_eqx.planning import Exchange
from mistral_eqx.planning.stablehlo import products, written


def lowered():
    """A sum and a product in a loop of five, called from two places, and a loop that no number ends."""
    mesh = jax.make_mesh((2, 1), ("a", "b"), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    strategy = mx.Strategy("hidden@a embed@b")

    @jax.jit
    def add(x):
        return mx.parallel.psum(x @ x, "hidden", strategy) / 2

    def program(x):
        x = jax.lax.fori_loop(0, 5, lambda turn, x: x + jnp.sum(add(x)), x)
        x = jax.lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x @ x, x)
        return mx.parallel.psum(add(x), "hidden embed", strategy) + mx.parallel.psum(jnp.sum(x), "embed", strategy)

    mapped = jax.shard_map(program, mesh=mesh, in_specs=jax.P("a"), out_specs=jax.P(), check_vma=False)
    return jax.jit(mapped).lower(jnp.ones((6, 3), jnp.bfloat16))


def test_exchanges_as_they_are_written():
    assert written(lowered()) == [Exchange("all_reduce", 2, 7, 7 * 3 * 3 * 2)]
    assert written(jax.jit(lambda x: x + 1).lower(jnp.ones(3))) == []


def test_products_count_as_often_as_a_loop_turns():
    assert products(lowered()) == 7 * 2 * 3 * 3 * 3
    assert products(
        jax.jit(lambda x, y: jnp.einsum("bij,bkj->bik", x, y)).lower(jnp.ones((2, 3, 5)), jnp.ones((2, 7, 5)))
    ) == (2 * 2 * 3 * 7 * 5)
