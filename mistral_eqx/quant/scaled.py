"""Weights with one scale for each row, for each column, or for all."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..nn import AbstractWeight
from ..nn.kernels import group_of_rows


By = Literal["row", "column", "tensor"]


class ScaledWeight(AbstractWeight):
    """A weight of which each number is `scale * (base - zero)`.

    **Attributes:**

    - `base`: a weight of codes.
    - `scale`: of each row, of each column, or of all numbers: shape `(*out)`, `(*in)` or `()`.
    - `by`: which of these.
    - `zero`: the code of 0, shape as `scale`; 0 unless given.
    """

    base: AbstractWeight
    scale: Float[Array, "..."]
    by: By = eqx.field(static=True)
    zero: Float[Array, "..."] | None = None

    def contract(self, x: Float[Array, "batch seq ..."], in_dims: str, out_dims: str) -> Float[Array, "batch seq ..."]:
        own = x * _at_end(self.scale, x.ndim).astype(x.dtype) if self.by == "column" else x
        return self._of_codes(self.base.contract(own, in_dims, out_dims), own)

    def contract_grouped(self, x: Float[Array, "rows in"], sizes: Int[Array, "groups"]) -> Float[Array, "rows out"]:
        own, of_rows = x, self
        if self.by == "column":
            own = x * _at_end(self.scale, x.ndim).astype(x.dtype)
        elif self.by == "row":
            # Each row of activations has the scales of its group's outputs.
            group = group_of_rows(sizes, len(x))
            zero = None if self.zero is None else self.zero[group]
            of_rows = dataclasses.replace(self, scale=self.scale[group], zero=zero)
        return of_rows._of_codes(self.base.contract_grouped(own, sizes)[None], own[None])[0]

    @classmethod
    def contract_together(
        cls, weights: Sequence[Any], x: Float[Array, "batch seq ..."], in_dims: str, out_dims: Sequence[str]
    ) -> list[Float[Array, "batch seq ..."]]:
        if any(one.by == "column" for one in weights) or len({type(one.base) for one in weights}) > 1:
            return [one.contract(x, in_dims, dims) for one, dims in zip(weights, out_dims, strict=True)]
        bases = [one.base for one in weights]
        ys = type(bases[0]).contract_together(bases, x, in_dims, out_dims)
        return [one._of_codes(y, x) for one, y in zip(weights, ys, strict=True)]

    def _of_codes(self, y: Array, x: Array) -> Array:
        """The result, given that of the codes and what they were applied to."""
        zero = self.zero
        if zero is not None:
            # Of the sum over (code - zero) * x, what belongs to the zeros.
            weighted = x * _at_end(zero, x.ndim) if self.by == "column" else x
            taken = jnp.sum(weighted, axis=tuple(range(2, x.ndim)), dtype=y.dtype)
            taken = taken.reshape(*taken.shape, *[1] * (y.ndim - 2))
            y = y - (taken if self.by == "column" else taken * _at_end(zero, y.ndim))
        return y if self.by == "column" else y * _at_end(self.scale, y.ndim)

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        rows = self.base.rows(ids)

        def of(factor: Array) -> Array:
            if self.by == "row":
                return factor[ids].reshape(*ids.shape, *[1] * (rows.ndim - 2))
            return _at_end(factor, rows.ndim)

        return (rows if self.zero is None else rows - of(self.zero)) * of(self.scale)

    @property
    def row_count(self) -> int:
        return self.base.row_count

    def dense(self) -> Float[Array, "..."]:
        base = self.base.dense()

        def of(factor: Array) -> Array:
            if self.by == "row":
                return factor.reshape(*factor.shape, *[1] * (base.ndim - factor.ndim))
            return _at_end(factor, base.ndim)

        return (base if self.zero is None else base - of(self.zero)) * of(self.scale)

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        base = {f"base.{field}": dims for field, dims in self.base.dims(in_dims, out_dims).items()}
        own = {"row": out_dims, "column": in_dims, "tensor": ""}[self.by]
        return {**base, "scale": own, "zero": own}


def _at_end(factor: Array, ndim: int) -> Array:
    """A factor of the last axes, with as many axes as the array that it multiplies."""
    return factor.reshape(*[1] * (ndim - factor.ndim), *factor.shape)
