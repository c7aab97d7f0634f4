"""Products with weights of floats by the C++ kernel, compared with float64 and with plain JAX."""

import functools
import inspect

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.cases import every_third
from jax.sharding import PartitionSpec as P

from mistral_eqx.nn.kernels import contract, native
from mistral_eqx.parallel import make_mesh


pytestmark = pytest.mark.skipif(native.instructions() is None, reason="The C++ kernels were not built.")

product = functools.partial(contract, inner=1)


def inputs(rows=1, outputs=64, width=128, dtype=jnp.float32):
    weight = jr.normal(jr.key(0), (outputs, width)).astype(dtype)
    return weight, jr.normal(jr.key(1), (rows, 1, width)).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", every_third(range(1, native.FEW + 1)))
def test_kernel_computes_the_product(rows, dtype):
    # The last sizes fill neither a register of inputs nor the outputs that are computed together.
    for outputs, width in ((64, 128), (300, 576), (7, 37), (1, 5)):
        weight, x = inputs(rows, outputs, width, dtype)
        exact = np.asarray(x, np.float64)[:, 0] @ np.asarray(weight, np.float64).T
        found = jax.jit(native.dense)(x[:, 0].astype(jnp.float32), weight)
        # Sums of up to 576 products in float32, relative to the size of such a sum.
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6 * np.sqrt(width))


@pytest.mark.parametrize(("dtype", "most"), [(jnp.float32, native.FEW), (jnp.float16, native.FEW), (jnp.bfloat16, 2)])
def test_kernel_is_chosen_for_few_rows_alone(dtype, most):
    few, more = (jax.jit(product).lower(*inputs(rows, dtype=dtype)).as_text() for rows in (most, most + 1))
    assert "mistral_eqx_dense" in few
    assert "mistral_eqx_dense" not in more
    exact = jnp.einsum("oi,rsi->rso", *(each.astype(jnp.float32) for each in inputs(most, dtype=dtype)))
    np.testing.assert_allclose(jax.jit(product)(*inputs(most, dtype=dtype)), exact, rtol=1e-5, atol=1e-5)


def test_row_does_not_depend_on_the_others():
    weight, x = inputs(native.FEW, 300, 576)
    together = jax.jit(product)(weight, x)
    for row in range(native.FEW):
        np.testing.assert_array_equal(jax.jit(product)(weight, x[row : row + 1]), together[row : row + 1])


def test_gradients_are_those_of_plain_jax():
    weight, x = inputs(3)
    found = jax.grad(lambda *both: jnp.sum(product(*both) ** 2), argnums=(0, 1))(weight, x)
    plain = jax.grad(lambda weight, x: jnp.sum(jnp.einsum("oi,rsi->rso", weight, x) ** 2), argnums=(0, 1))(weight, x)
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_mesh_gives_what_one_device_gives():
    weight, x = inputs(2)
    mesh = make_mesh({"tp": 4})
    split = jax.shard_map(product, mesh=mesh, in_specs=(P("tp"), P()), out_specs=P(None, None, "tp"))
    np.testing.assert_array_equal(jax.jit(split)(weight, x), jax.jit(product)(weight, x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("sizes", "width"), [([0, 1, 11, 0, 3], 37), ([300, 0, 8, 17, 9], 520)])
def test_grouped_kernel_computes_each_group_with_its_own_weight(sizes, width, dtype):
    # Empty groups, more rows and inputs than are multiplied at once, parts of tiles, and rows of no group.
    draw, own = np.random.default_rng(0).standard_normal, np.repeat(np.arange(5), sizes)
    weights, x = jnp.asarray(draw((5, 33, width)), dtype), jnp.asarray(draw((len(own) + 3, width)), dtype)
    found = jax.jit(native.grouped_dense)(x.astype(jnp.float32), jnp.asarray(sizes), weights)
    every = np.einsum("goi,ri->rgo", np.asarray(weights, np.float64), np.asarray(x, np.float64)[:-3])
    exact = every[np.arange(len(own)), own]
    # Products are added one after the other: each of `width` partial sums, up to sqrt(width) large, is rounded.
    np.testing.assert_allclose(found[:-3], exact, rtol=1e-6, atol=1e-7 * width)
    assert not found[-3:].any()


def test_row_of_a_group_does_not_depend_on_the_others():
    draw = np.random.default_rng(0).standard_normal
    weights, x = jnp.asarray(draw((1, 33, 300)), jnp.float32), jnp.asarray(draw((40, 300)), jnp.float32)
    all_rows, some = (jax.jit(native.grouped_dense)(x[:rows], jnp.asarray([rows]), weights) for rows in (40, 19))
    np.testing.assert_array_equal(some, all_rows[:19])


def test_groups_that_do_not_fit_are_refused_by_the_library():
    weights, x, sizes = jnp.ones((2, 16, 32)), jnp.ones((4, 32)), jnp.array([1, 2], jnp.int32)
    call = inspect.unwrap(native.grouped_dense)
    for bad in ((x[:, :-1], sizes, weights), (x, sizes[:1], weights), (x, sizes, weights[0])):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
            jax.block_until_ready(call(*bad))
    panels = jnp.ones((2, 1, 1, 16 * 34), jnp.uint8)
    linear = inspect.unwrap(native.grouped_linear)
    for bad in ((x[:, :-1], sizes, [panels]), (x, sizes[:1], [panels]), (x, sizes, [panels[0]])):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
            jax.block_until_ready(linear(*bad, ["Q8_0"]))
    for bad in ([3, 2], [-1, 2], [2**31 - 1, 2**31 - 1]):
        for product, weight, more in ((call, weights, ()), (linear, [panels], (["Q8_0"],))):
            with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit the rows"):
                jax.block_until_ready(product(x, jnp.array(bad, jnp.int32), weight, *more))


def test_shapes_that_do_not_fit_are_refused_by_the_library():
    weight, x = inputs(2)
    x = x[:, 0]
    # Without the annotations, which refuse such shapes first.
    call = inspect.unwrap(native.dense)
    for bad in ((x[:, :-1], weight), (x, weight[:, :-1]), (jnp.tile(x, (8, 1)), weight), (x, weight[None])):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
            jax.block_until_ready(call(*bad))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no products for the precision"):
        jax.block_until_ready(call(x, weight.astype(jnp.int32)))
