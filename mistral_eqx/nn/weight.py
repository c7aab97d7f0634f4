"""How a weight is stored and contracted."""

import abc
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..errors import InputError
from .kernels import contract, contract_grouped, rows


class AbstractWeight(eqx.Module):
    """The storage of a linear map. A layer says which dimensions are contracted; its weight says how.

    To add a storage format, subclass this and define the methods. Inside `shard_map` the arrays are this device's
    shards, and the results may be partial sums: the layer adds them up, not the weight.
    """

    @abc.abstractmethod
    def contract(self, x: Float[Array, "batch seq *in"], in_dims: str, out_dims: str) -> Float[Array, "batch seq *out"]:
        """Applies the map.

        **Arguments:**

        - `x`: activations, shape `(batch, seq, *in)`.
        - `in_dims`, `out_dims`: the names of the contracted and of the resulting dimensions.

        **Returns:** an array of shape `(batch, seq, *out)`, in the precision of the sum: float32 for 16-bit
        activations.
        """

    @classmethod
    def contract_together(
        cls, weights: Sequence[Any], x: Float[Array, "batch seq ..."], in_dims: str, out_dims: Sequence[str]
    ) -> list[Float[Array, "batch seq ..."]]:
        """Applies several maps of this format to the same activations, in one call where the format has such a kernel.

        **Arguments:**

        - `weights`: the maps.
        - `x`, `in_dims`: as for `contract`.
        - `out_dims`: the names of each map's resulting dimensions.
        """
        return [weight.contract(x, in_dims, dims) for weight, dims in zip(weights, out_dims, strict=True)]

    def contract_grouped(self, x: Float[Array, "rows in"], sizes: Int[Array, "groups"]) -> Float[Array, "rows out"]:
        """Applies one of stacked maps of shape `(groups, out, in)` to each group of rows, and reads no other.

        **Arguments:**

        - `x`: activations, group after group.
        - `sizes`: the number of rows of each group. Results of rows after the last group are arbitrary.

        **Returns:** the results, in the precision of the sum.

        **Raises:** `ValueError` if the format has no such product.
        """
        raise InputError(f"A {type(self).__name__} cannot hold the weights of experts; quantize them another way.")

    @abc.abstractmethod
    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        """Looks up rows by their index in the first dimension, as an embedding does."""

    @property
    def depends_on_index(self) -> bool:
        """Whether the result for a token depends on its index too: then all tokens must be contracted at once."""
        return False

    @property
    @abc.abstractmethod
    def row_count(self) -> int:
        """The number of rows."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, "..."]:
        """The map as an array of floats, shape `(*out, *in)`, dequantised if it is quantised."""

    @abc.abstractmethod
    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        """The dimensions of each array field, by the field's name; a `Strategy` turns them into `PartitionSpec`s."""


class DenseWeight(AbstractWeight):
    """An array of floats, stored `(*out, *in)` as every checkpoint has it."""

    value: Float[Array, "..."]

    @classmethod
    def init(
        cls, shape: tuple[int, ...], std: float, *, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32
    ) -> "DenseWeight":
        """Draws from a normal distribution of standard deviation `std`."""
        return cls(jr.normal(key, shape, dtype) * jnp.asarray(std, dtype))

    def contract(self, x: Float[Array, "batch seq *in"], in_dims: str, out_dims: str) -> Float[Array, "batch seq *out"]:
        return contract(self.value, x, len(in_dims.split()))

    def contract_grouped(self, x: Float[Array, "rows in"], sizes: Int[Array, "groups"]) -> Float[Array, "rows out"]:
        return contract_grouped(self.value, x, sizes)

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        return rows(self.value, ids)

    @property
    def row_count(self) -> int:
        return self.value.shape[0]

    def dense(self) -> Float[Array, "..."]:
        return self.value

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        return {"value": f"{out_dims} {in_dims}"}
