"""Weights in the blocks of a GGUF file, as they are in the file."""

import math

import equinox as eqx
from jaxtyping import Array, Float, Int, UInt8

from ..nn import AbstractWeight, DenseWeight
from .ggml import FORMATS, BlockFormat


class BlockWeight(AbstractWeight):
    """A weight in blocks of consecutive inputs, which is dequantized where it is used and nowhere else.

    **Attributes:**

    - `blocks`: shape `(*out, *in, bytes)`, where the last axis of the inputs counts blocks and not numbers.
    - `format`: the name of a format in `mistral_eqx.quant.FORMATS`, such as `"Q4_K"`.
    - `merged`: the sizes of the last input dimensions if their product is one axis of `blocks`, because a block does
        not fit into the last dimension alone. No strategy can split these.
    """

    blocks: UInt8[Array, "..."]
    format: str = eqx.field(static=True)
    merged: tuple[int, ...] = eqx.field(static=True, default=())

    @property
    def kind(self) -> BlockFormat:
        """The format."""
        return FORMATS[self.format]

    def contract(self, x: Float[Array, "batch seq ..."], in_dims: str, out_dims: str) -> Float[Array, "batch seq ..."]:
        if self.merged:
            x = x.reshape(*x.shape[: x.ndim - len(self.merged)], -1)
            in_dims = " ".join([*in_dims.split()[: -len(self.merged)], "_"])
        return DenseWeight(self._matrices(self.blocks).astype(x.dtype)).contract(x, in_dims, out_dims)

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        return self._numbers(self.blocks[ids])

    @property
    def row_count(self) -> int:
        return self.blocks.shape[0]

    def dense(self) -> Float[Array, "..."]:
        return self._numbers(self.blocks)

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        return {"blocks": block_dims(in_dims, out_dims, self.merged)}

    def _numbers(self, blocks: UInt8[Array, "..."]) -> Float[Array, "..."]:
        numbers = self._matrices(blocks)
        return numbers.reshape(*numbers.shape[:-1], *self.merged) if self.merged else numbers

    def _matrices(self, blocks: UInt8[Array, "..."]) -> Float[Array, "..."]:
        """The numbers with merged dimensions as one."""
        numbers = self.kind.dequantize(blocks)
        return numbers.reshape(*numbers.shape[:-2], -1)


def block_dims(in_dims: str, out_dims: str, merged: tuple[int, ...]) -> str:
    """The dimensions of an array of blocks; `_` is one that has no name."""
    names = in_dims.split()
    if merged:
        names = [*names[: -len(merged)], "_"]
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
