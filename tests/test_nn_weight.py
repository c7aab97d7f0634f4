import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.model import relative_error

from mistral_eqx.nn import DenseWeight


DTYPES = ("float32", "bfloat16", "float16")


def _draw(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_seq", [(1, 1), (1, 2), (2, 1), (3, 5)], ids=str)
@pytest.mark.parametrize(
    ("in_dims", "out_dims", "in_shape", "out_shape"),
    [
        ("embed", "hidden", (32,), (24,)),
        ("embed", "kv_heads q_per_kv head_dim", (32,), (2, 3, 4)),
        ("kv_heads q_per_kv head_dim", "embed", (2, 3, 4), (32,)),
    ],
    ids=["matrix", "to_heads", "from_heads"],
)
def test_contract_is_that_of_numpy(dtype, batch_seq, in_dims, out_dims, in_shape, out_shape):
    weight, x = DenseWeight(_draw((*out_shape, *in_shape), dtype)), _draw((*batch_seq, *in_shape), dtype, seed=1)
    y = jax.jit(lambda weight, x: weight.contract(x, in_dims, out_dims))(weight, x)
    # Sums are in float32, so that only the inputs are rounded.
    assert y.dtype == jnp.float32
    flat = np.asarray(weight.value, np.float64).reshape(np.prod(out_shape), -1)
    expected = np.asarray(x, np.float64).reshape(*batch_seq, -1) @ flat.T
    assert relative_error(y, expected.reshape(*batch_seq, *out_shape)) < 2e-6


def test_contract_in_float64():
    with jax.enable_x64(True):
        weight, x = DenseWeight(_draw((5, 7), jnp.float64)), _draw((1, 1, 7), jnp.float64)
        y = weight.contract(x, "embed", "hidden")
        assert y.dtype == jnp.float64
        assert relative_error(y[0, 0], np.asarray(weight.value) @ np.asarray(x[0, 0])) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_has_the_gradient_of_a_product(dtype):
    weight, x = DenseWeight(_draw((6, 2, 4), dtype)), _draw((1, 1, 2, 4), dtype, seed=1)
    cotangent = _draw((1, 1, 6), jnp.float32, seed=2)
    _, pull = jax.vjp(lambda weight, x: weight.contract(x, "kv_heads head_dim", "embed"), weight, x)
    for_weight, for_x = pull(cotangent)
    w, v, c = (np.asarray(array, np.float64) for array in (weight.value, x[0, 0], cotangent[0, 0]))
    bound = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}[dtype]
    assert relative_error(for_weight.value, c[:, None, None] * v) < bound
    assert relative_error(for_x[0, 0], np.einsum("o,oij->ij", c, w)) < bound


def test_gradient_of_scanned_layers_copies_no_weights():
    weights, x = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32), jax.ShapeDtypeStruct((2, 3, 8), jnp.float32)

    def loss(weights, x):
        def layer(x, weight):
            return jnp.sin(DenseWeight(weight).contract(x, "embed", "hidden")), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    forward, backward = (
        [output.aval.shape for output in equation.outvars]
        for equation in jax.make_jaxpr(jax.grad(loss))(weights, x).eqns
        if equation.primitive.name == "scan"
    )
    # Of the activations it keeps those that came in, as matrices.
    assert (3, 2 * 3, 8) in forward
    assert weights.shape not in forward
    assert backward.count(weights.shape) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_table(dtype):
    table, ids = _draw((50, 8), dtype), jnp.asarray([[0, 49, 7], [7, 7, 31]], jnp.int32)
    found = jax.jit(DenseWeight.rows)(DenseWeight(table), ids)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.asarray(table)[np.asarray(ids)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_gradient_of_a_product_with_one_hot_rows(dtype):
    ids = jnp.asarray([[3, 0, 3], [3, 1, 5]], jnp.int32)
    one_hot = jax.nn.one_hot(ids, 7, dtype=dtype)
    # Small integers, whose sums are exact in each precision.
    cotangent = jnp.asarray(np.random.default_rng(2).integers(-8, 8, (2, 3, 4)), dtype)
    table = _draw((7, 4), dtype)

    def pulled(look_up):
        return jax.jit(lambda table, cotangent: jax.vjp(look_up, table)[1](cotangent)[0])(table, cotangent)

    found = pulled(lambda table: DenseWeight(table).rows(ids))
    expected = pulled(lambda table: jnp.einsum("bsv,ve->bse", one_hot, table))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    assert np.any(np.asarray(found[3]) != 0)
    assert np.all(np.asarray(found[jnp.asarray([2, 4, 6])]) == 0)
    tangent = _draw((7, 4), dtype, seed=3)
    _, moved = jax.jvp(lambda table: DenseWeight(table).rows(ids), (table,), (tangent,))
    np.testing.assert_array_equal(moved, np.asarray(tangent)[np.asarray(ids)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_under_vmap(dtype):
    tables, ids = _draw((3, 5, 2), dtype), jnp.asarray([[4, 0]], jnp.int32)
    found = jax.vmap(lambda table: DenseWeight(table).rows(ids))(tables)
    np.testing.assert_array_equal(found, np.asarray(tables)[:, [[4, 0]]])


def test_dims_name_every_axis():
    weight = DenseWeight(_draw((2, 3, 4, 5), "float32"))
    dims = weight.dims("embed", "kv_heads q_per_kv head_dim")
    assert dims == {"value": "kv_heads q_per_kv head_dim embed"}
    assert {field: len(names.split()) for field, names in dims.items()} == {"value": weight.value.ndim}


def test_init_draws_the_standard_deviation(getkey):
    value = DenseWeight.init((100, 50), 0.5, key=getkey(), dtype=jnp.bfloat16).value
    assert value.dtype == jnp.bfloat16
    assert np.std(np.asarray(value, np.float64)) == pytest.approx(0.5, rel=0.05)
