"""Weights whose inputs are stored in another order."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..nn import AbstractWeight
from ..parallel import whole


class OrderedWeight(AbstractWeight):
    """A weight whose inputs are sorted by the group to which they belong, as GPTQ with `desc_act` leaves them.

    The inputs stand on one axis, which no strategy can split.

    **Attributes:**

    - `base`: the weight of the sorted inputs.
    - `order`: for each of them, its index among the layer's inputs.
    - `inverse`: for each of the layer's inputs, its index among the sorted ones.
    """

    base: AbstractWeight
    order: Int[Array, " inputs"]
    inverse: Int[Array, " inputs"]

    def contract(self, x: Float[Array, "batch seq ..."], in_dims: str, out_dims: str) -> Float[Array, "batch seq ..."]:
        flat = x.reshape(*x.shape[:2], -1)
        return self.base.contract(jnp.take(flat, self.order, axis=2), in_dims, out_dims)

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        rows = self.base.rows(ids)
        return jnp.take(rows.reshape(*ids.shape, -1), self.inverse, axis=2).reshape(rows.shape)

    @property
    def row_count(self) -> int:
        return self.base.row_count

    def dense(self) -> Float[Array, "..."]:
        base = self.base.dense()
        inputs = self.order.shape[0]
        return jnp.take(base.reshape(-1, inputs), self.inverse, axis=1).reshape(base.shape)

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        base = {f"base.{field}": dims for field, dims in self.base.dims(in_dims, out_dims).items()}
        own = whole(in_dims)
        return {**base, "order": own, "inverse": own}
