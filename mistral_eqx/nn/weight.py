"""How a weight is stored and contracted: the one place that chooses a lowering for the platform."""

import abc
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .precision import at_least_float32, from_bits, to_bits


class AbstractWeight(eqx.Module):
    """The storage of a linear map. A layer says which dimensions are contracted; its weight knows how.

    To add a storage format, subclass this and define the methods. Inside `shard_map` the arrays are this
    device's part, and so are the results: partial sums are added up by the layer, not here.
    """

    @abc.abstractmethod
    def contract(self, x: Float[Array, "batch seq *in"], in_dims: str, out_dims: str) -> Float[Array, "batch seq *out"]:
        """Applies the map.

        **Arguments:**

        - `x`: activations, shape `(batch, seq, *in)`.
        - `in_dims`, `out_dims`: the names of the contracted and of the resulting dimensions.

        **Returns:** an array of shape `(batch, seq, *out)`, in the precision in which the sum was taken: float32
        for 16-bit activations.
        """

    @abc.abstractmethod
    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        """Looks up rows by their index in the first dimension, as an embedding table is read."""

    @property
    @abc.abstractmethod
    def row_count(self) -> int:
        """How many rows there are to look up."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, "..."]:
        """The map as an array of floats, shape `(*out, *in)`: itself, or what it stands for."""

    @abc.abstractmethod
    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        """The dimensions of each array field, by the field's name: what a `Strategy` turns into shardings."""


class DenseWeight(AbstractWeight):
    """An array of floats, stored `(*out, *in)` as every checkpoint has it."""

    value: Float[Array, "..."]

    @classmethod
    def init(
        cls, shape: tuple[int, ...], std: float, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
    ) -> "DenseWeight":
        """Draws a normal distribution of standard deviation `std`."""
        return cls(jr.normal(key, shape, dtype) * jnp.asarray(std, dtype))

    def contract(self, x: Float[Array, "batch seq *in"], in_dims: str, out_dims: str) -> Float[Array, "batch seq *out"]:
        return _contract(self.value, x, len(in_dims.split()))

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        return _rows(self.value, ids)

    @property
    def row_count(self) -> int:
        return self.value.shape[0]

    def dense(self) -> Float[Array, "..."]:
        return self.value

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        return {"value": f"{out_dims} {in_dims}"}


@jax.custom_jvp
def _rows(table: Array, ids: Array) -> Array:
    if table.dtype.itemsize == 2:
        return lax.platform_dependent(table, ids, cpu=_rows_of_bits, default=_rows_of_floats)
    return _rows_of_floats(table, ids)


@_rows.defjvp
def _rows_jvp(primals, tangents):
    # Bits have no gradient, and rows are linear in the table.
    (table, ids), (tangent, _) = primals, tangents
    return _rows(table, ids), _rows_of_floats(tangent, ids)


def _rows_of_floats(table: Array, ids: Array) -> Array:
    return table[ids]


def _rows_of_bits(table: Array, ids: Array) -> Array:
    # Bound to the ids, the table's bits cannot be computed ahead of a decoding loop, which would copy it.
    table, ids = lax.optimization_barrier((table, ids))
    return from_bits(to_bits(table)[ids], table.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _contract(weight: Array, x: Array, inner: int) -> Array:
    return lax.platform_dependent(
        weight, x, cpu=partial(_contract_cpu, inner=inner), default=partial(_contract_as_stored, inner=inner)
    )


def _contract_jvp(inner: int, primals, tangents):
    # Linear in each: a gradient needs weight and activations as they came in. Through the choice of a platform it would
    # keep what each lowering makes of them, and a scan over layers would so write copies of all weights.
    (weight, x), (d_weight, d_x) = primals, tangents
    parts = [
        _contract_as_stored(one, other, inner)
        for one, other in ((d_weight, x), (weight, d_x))
        if not isinstance(one, SymbolicZero) and not isinstance(other, SymbolicZero)
    ]
    return _contract(weight, x, inner), sum(parts[1:], start=parts[0])


_contract.defjvp(_contract_jvp, symbolic_zeros=True)


def _contract_as_stored(weight: Array, x: Array, inner: int) -> Array:
    # Tokens are one dimension: gradients are then products of matrices, which XLA on CPU does not lay out anew.
    (batch, seq), outer = x.shape[:2], weight.ndim - inner
    x = x.reshape(batch * seq, *x.shape[2:])
    contracted = tuple(range(outer, weight.ndim)), tuple(range(1, x.ndim))
    y = lax.dot_general(weight, x, (contracted, ((), ())), preferred_element_type=at_least_float32(x.dtype))
    return jnp.moveaxis(y, -1, 0).reshape(batch, seq, *y.shape[:-1])


def _contract_cpu(weight: Array, x: Array, inner: int) -> Array:
    # The fast kernels of XLA on CPU want matrices. They read the left operand as it is stored, but make a transposed
    # copy of the right one at each call: so the weight comes first.
    (batch, seq), outer, columns = x.shape[:2], weight.shape[: weight.ndim - inner], math.prod(x.shape[2:])
    weight, x = weight.reshape(-1, columns), x.reshape(-1, columns)
    if batch * seq == 1 and x.dtype.itemsize == 2:
        # A single row takes a path of its own, which first turns a 16-bit weight into a float32 copy. Two do not.
        x = jnp.concatenate([x, x])
    y = lax.dot_general(weight, x, (((1,), (1,)), ((), ())), preferred_element_type=at_least_float32(x.dtype))
    return y.T[: batch * seq].reshape(batch, seq, *outer)
