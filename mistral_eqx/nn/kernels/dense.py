"""Products with weights that are arrays of floats."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from ...parallel import kernel, vary_alike
from ..precision import at_least_float32, from_bits, to_bits
from . import native


@jax.custom_jvp
def rows(table: Float[Array, "vocab ..."], ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
    """The rows of a table by their index."""
    if table.dtype.itemsize == 2:
        return lax.platform_dependent(table, ids, cpu=_rows_of_bits, default=_rows_of_floats)
    return _rows_of_floats(table, ids)


@rows.defjvp
def _rows_jvp(primals, tangents):
    # Bits have no gradient, and rows are linear in the table.
    (table, ids), (tangent, _) = primals, tangents
    return rows(table, ids), _rows_of_floats(tangent, ids)


def _rows_of_floats(table: Array, ids: Array) -> Array:
    return table[ids]


def _rows_of_bits(table: Array, ids: Array) -> Array:
    # Without the barrier, XLA computes the table's bits before a decoding loop, which copies the table.
    table, ids = lax.optimization_barrier((table, ids))
    return from_bits(to_bits(table)[ids], table.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def contract(
    weight: Float[Array, "..."], x: Float[Array, "batch seq ..."], inner: int
) -> Float[Array, "batch seq ..."]:
    """The product of a weight, stored `(*out, *in)`, and activations; sums are float32 or wider.

    **Arguments:**

    - `inner`: the number of contracted dimensions, the last ones of both arrays.
    """
    as_stored = partial(_contract_as_stored, inner=inner)
    # Some processors multiply numbers in bfloat16, which pays for more rows than these.
    few = 2 if weight.dtype == jnp.bfloat16 else native.FEW
    if native.instructions() is None or x.shape[0] * x.shape[1] > few or x.dtype.itemsize == 8:
        return lax.platform_dependent(weight, x, cpu=partial(contract_cpu, inner=inner), default=as_stored)
    by_kernel = partial(_contract_few, inner=inner)
    return kernel(partial(lax.platform_dependent, cpu=by_kernel, default=as_stored))(*vary_alike(weight, x))


def _contract_jvp(inner: int, primals, tangents):
    # Gradients of a linear map need only `weight` and `x`. A gradient through `platform_dependent` would save each
    # lowering's intermediates, and a scan over layers would write copies of all weights.
    (weight, x), (d_weight, d_x) = primals, tangents
    terms = [
        _contract_as_stored(one, other, inner)
        for one, other in ((d_weight, x), (weight, d_x))
        if not isinstance(one, SymbolicZero) and not isinstance(other, SymbolicZero)
    ]
    return contract(weight, x, inner), sum(terms[1:], start=terms[0])


contract.defjvp(_contract_jvp, symbolic_zeros=True)


def _contract_as_stored(weight: Array, x: Array, inner: int) -> Array:
    # With all tokens in one dimension, gradients are matrix products, whose operands XLA on CPU need not copy.
    (batch, seq), outer = x.shape[:2], weight.ndim - inner
    x = x.reshape(batch * seq, *x.shape[2:])
    contracted = tuple(range(outer, weight.ndim)), tuple(range(1, x.ndim))
    y = lax.dot_general(weight, x, (contracted, ((), ())), preferred_element_type=at_least_float32(x.dtype))
    return jnp.moveaxis(y, -1, 0).reshape(batch, seq, *y.shape[:-1])


def _contract_few(weight: Array, x: Array, inner: int) -> Array:
    (batch, seq), outer, columns = x.shape[:2], weight.shape[: weight.ndim - inner], math.prod(x.shape[2:])
    y = native.dense(x.reshape(-1, columns).astype(jnp.float32), weight.reshape(-1, columns))
    return y.reshape(batch, seq, *outer)


def contract_cpu(weight: Array, x: Array, inner: int) -> Array:
    # The fast kernels of XLA on CPU take matrices. They read the left operand as it is stored, but copy the right one
    # transposed at each call, so the weight comes first.
    (batch, seq), outer, columns = x.shape[:2], weight.shape[: weight.ndim - inner], math.prod(x.shape[2:])
    weight, x = weight.reshape(-1, columns), x.reshape(-1, columns)
    if batch * seq == 1 and x.dtype.itemsize == 2:
        # For a single row, XLA first copies a 16-bit weight to float32; for two rows it does not.
        x = jnp.concatenate([x, x])
    y = lax.dot_general(weight, x, (((1,), (1,)), ((), ())), preferred_element_type=at_least_float32(x.dtype))
    return y.T[: batch * seq].reshape(batch, seq, *outer)
