"""How a weight is stored and contracted: the one place that chooses a lowering for the platform."""

import abc

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .precision import at_least_float32


class AbstractWeight(eqx.Module):
    """The storage of a linear map. A layer says which dimensions are contracted; its weight knows how.

    To add a storage format, subclass this and define the three methods. Inside `shard_map` the arrays are this
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
        batch_seq = x.shape[:2]
        out_shape = self.value.shape[: len(out_dims.split())]
        columns = x[0, 0].size
        y = _matmul(self.value.reshape(-1, columns), x.reshape(-1, columns))
        return y.reshape(*batch_seq, *out_shape)

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        return self.value[ids]

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        return {"value": f"{out_dims} {in_dims}"}


def _matmul(weight: Float[Array, "out in"], x: Float[Array, "rows in"]) -> Float[Array, "rows out"]:
    if x.shape[0] == 1 and x.dtype != jnp.float32:
        return lax.platform_dependent(weight, x, cpu=_matvec_cpu, default=_weight_first)
    return _weight_first(weight, x)


def _weight_first(weight: Array, x: Array) -> Array:
    # With the weight as the left operand XLA on CPU reads it as it is stored; as the right one it makes a
    # transposed copy of it at each call. Other platforms do not mind.
    over_columns = (((1,), (1,)), ((), ()))
    return lax.dot_general(weight, x, over_columns, preferred_element_type=at_least_float32(x.dtype)).T


def _matvec_cpu(weight: Array, x: Array) -> Array:
    # XLA on CPU has a path of its own for a single row, which first turns a 16-bit weight into a float32 copy.
    # Two rows take the library's kernel, which reads the weight once, as it is.
    return _weight_first(weight, jnp.broadcast_to(x, (2, x.shape[1])))[:1]
