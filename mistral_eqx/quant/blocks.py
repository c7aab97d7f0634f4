"""Weights in the blocks of a GGUF file."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, UInt8

from ..nn import AbstractWeight
from ..parallel import whole
from .product import Flat, grouped_products, matrix, products
from .table import block_format


class BlockWeight(AbstractWeight):
    """A weight in blocks of consecutive inputs, which is dequantized where it is used and nowhere else.

    **Attributes:**

    - `blocks`: shape `(*out, *in, bytes)`, where the last axis of the inputs counts blocks and not numbers, and the
        last axis of the outputs counts panels of rows.
    - `format`: the name of a format, such as `"Q4_K"` ([`mistral_eqx.quant.block_format`][]).
    - `out_axes`: how many axes are of outputs.
    - `merged`: the sizes of the last input dimensions if their product is one axis of `blocks`, because a block does
        not fit into the last dimension alone. No strategy can split these.
    - `panel`: how many rows stand side by side for the kernels ([`mistral_eqx.quant.to_panels`][]); 1 for the blocks as
        they are in the file.
    """

    blocks: UInt8[Array, "..."]
    format: str = eqx.field(static=True)
    out_axes: int = eqx.field(static=True)
    merged: tuple[int, ...] = eqx.field(static=True, default=())
    panel: int = eqx.field(static=True, default=1)

    def contract(self, x: Float[Array, "batch seq ..."], in_dims: str, out_dims: str) -> Float[Array, "batch seq ..."]:
        return self.contract_together([self], x, in_dims, [out_dims])[0]

    @classmethod
    def contract_together(
        cls, weights: Sequence[Any], x: Float[Array, "batch seq ..."], in_dims: str, out_dims: Sequence[str]
    ) -> list[Float[Array, "batch seq ..."]]:
        batch, seq = x.shape[:2]
        flat = [one._flat(one.blocks, one.out_axes) for one in weights]
        ys = products(x.reshape(batch * seq, -1), flat, [Flat(one.format, one.panel) for one in weights])
        return [y.reshape(batch, seq, *one._out_shape) for y, one in zip(ys, weights, strict=True)]

    def contract_grouped(self, x: Float[Array, "rows in"], sizes: Int[Array, "groups"]) -> Float[Array, "rows out"]:
        return grouped_products(x, sizes, self.blocks, Flat(self.format, self.panel))

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        panels = self._flat(self.blocks[ids // self.panel], 2)
        rows = matrix(panels, self.format, self.panel).reshape(*ids.shape, self.panel, *self._in_shape)
        index = (ids % self.panel).reshape(*ids.shape, *[1] * (rows.ndim - 2))
        return jnp.take_along_axis(rows, index, axis=2)[:, :, 0]

    @property
    def row_count(self) -> int:
        return self._out_shape[0]

    def dense(self) -> Float[Array, "..."]:
        flat = self._flat(self.blocks, self.out_axes)
        return matrix(flat, self.format, self.panel).reshape(*self._out_shape, *self._in_shape)

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        return {"blocks": block_dims(in_dims, out_dims, self.merged)}

    @property
    def _out_shape(self) -> tuple[int, ...]:
        *outer, panels = self.blocks.shape[: self.out_axes]
        return *outer, panels * self.panel

    @property
    def _in_shape(self) -> tuple[int, ...]:
        *outer, blocks = self.blocks.shape[self.out_axes : -1]
        return *outer, *(self.merged or (blocks * block_format(self.format).size,))

    def _flat(self, blocks: UInt8[Array, "..."], axes: int) -> UInt8[Array, "panels blocks bytes"]:
        """All panels on one axis, and all blocks of a row on another."""
        return blocks.reshape(math.prod(blocks.shape[:axes]), -1, blocks.shape[-1])


def formats(model: PyTree) -> list[str]:
    """The names of the block formats that the weights of a model have, the most common one first."""
    leaves = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, BlockWeight))
    counts = collections.Counter(leaf.format for leaf in leaves if isinstance(leaf, BlockWeight))
    return [name for name, _ in counts.most_common()]


def block_dims(in_dims: str, out_dims: str, merged: tuple[int, ...]) -> str:
    """The dimensions of an array of blocks; `_` is one that has no name."""
    names = in_dims.split()
    if merged:
        names = [*names[: -len(merged)], whole(" ".join(names[-len(merged) :]))]
    return " ".join([out_dims, *names, "_"])


def merged_sizes(in_shape: tuple[int, ...], size: int) -> tuple[int, ...] | None:
    """The sizes of the last input dimensions that together are a multiple of a block's size.

    **Returns:** `()` if the last dimension alone is; `None` if all of them together are not.
    """
    for count in range(1, len(in_shape) + 1):
        last = in_shape[len(in_shape) - count :]
        if math.prod(last) % size == 0:
            return () if count == 1 else last
    return None
