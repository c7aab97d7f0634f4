"""What is exchanged and multiplied, read from programs whose answers can be counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp

import mistral_eqx as mx
from mistral_eqx.planning import Exchange
from mistral_eqx.planning.hlo import Program
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


def test_a_group_is_the_devices_along_the_axes_of_an_exchange():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def program(x):
        rows = jax.lax.all_gather(x, "b", tiled=True)
        shard = jax.lax.psum_scatter(rows, "b", tiled=True) + jax.lax.all_to_all(x, "a", 0, 1, tiled=True).reshape(
            x.shape
        )
        shifted = jax.lax.ppermute(shard, "b", [(0, 1), (1, 2)])
        grouped = jax.lax.psum(x, "b", axis_index_groups=[[0, 1], [2, 3]])
        return jax.lax.psum(jnp.sum(shifted + grouped), ("b", "a")) + jax.lax.psum(jnp.max(x), "a")

    mapped = jax.shard_map(program, mesh=mesh, in_specs=jax.P("b"), out_specs=jax.P(), check_vma=False)
    found = written(jax.jit(mapped).lower(jnp.ones((8, 6))))
    assert sorted(dataclasses.astuple(exchange) for exchange in found) == [
        ("all_gather", 4, 1, 2 * 6 * 4),
        ("all_reduce", 2, 2, 2 * 6 * 4 + 4),
        ("all_reduce", 8, 1, 4),
        ("all_to_all", 2, 1, 2 * 6 * 4),
        ("collective_permute", 2, 1, 2 * 6 * 4),
        ("reduce_scatter", 4, 1, 8 * 6 * 4),
    ]


def test_products_count_as_often_as_a_loop_turns():
    assert products(lowered()) == 7 * 2 * 3 * 3 * 3
    assert products(
        jax.jit(lambda x, y: jnp.einsum("bij,bkj->bik", x, y)).lower(jnp.ones((2, 3, 5)), jnp.ones((2, 7, 5)))
    ) == (2 * 2 * 3 * 7 * 5)


def test_of_a_conditional_the_branch_that_sends_less_counts():
    mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))

    def program(x):
        # A device sends 3 times its input to gather it, and 3/4 of its input by all_to_all.
        def gathered(x):
            return jnp.sum(jax.lax.all_gather(x, "a", tiled=True).reshape(4, -1), axis=0)

        def exchanged(x):
            return 2 * jax.lax.all_to_all(jnp.tile(x, 2), "a", 0, 0, tiled=True)[: x.size]

        return jax.lax.cond(jax.lax.pmax(x[0], "a") > 0, exchanged, gathered, x)

    mapped = jax.shard_map(program, mesh=mesh, in_specs=jax.P("a"), out_specs=jax.P("a"), check_vma=False)
    lowered = jax.jit(mapped).lower(jnp.ones(32))
    expected = [("all_reduce", 4, 1, 4), ("all_to_all", 4, 1, 2 * 8 * 4)]
    program = Program(lowered.compile().as_text())
    for found in (written(lowered), program.exchanges(program.entry)):
        assert sorted(dataclasses.astuple(exchange) for exchange in found) == expected
