"""Weights around another one, which change what it is applied to or watch it."""

import abc

import equinox as eqx
from jaxtyping import Array, Float, Int

from ..nn import AbstractWeight


class AbstractWrapped(AbstractWeight):
    """A weight around another one; to add one, subclass this and define `contract`.

    **Attributes:**

    - `base`: the weight whose numbers it has.
    """

    base: eqx.AbstractVar[AbstractWeight]

    @abc.abstractmethod
    def contract(self, x: Float[Array, "batch seq ..."], in_dims: str, out_dims: str) -> Float[Array, "batch seq ..."]:
        """Applies the map, as in [`mistral_eqx.nn.AbstractWeight`][]."""

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        return self.base.rows(ids)

    @property
    def row_count(self) -> int:
        return self.base.row_count

    def dense(self) -> Float[Array, "..."]:
        return self.base.dense()

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        return {f"base.{field}": dims for field, dims in self.base.dims(in_dims, out_dims).items()}
