"""Folders in FP8."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from ...errors import InputError
from ..block_tensor import BlockTensor, StackedTensor
from ..reader import LazyTensor, matrix_rows
from .parts import Parts, Quantization, everything, scalar, scaled_tensor


@dataclasses.dataclass(frozen=True)
class FP8Weights(Quantization):
    """Floats of 8 bits (e4m3) with a scale for all, or for each block of rows and columns.

    **Attributes:**

    - `block`: rows and columns of a block; `None` for one scale.
    - `parts`: the ends of the names of the codes, of their scale, and of the scale of activations, which is not used:
        activations are not rounded.
    """

    block: tuple[int, int] | None
    parts: tuple[str, ...] = ("weight", "weight_scale_inv", "activation_scale")

    def weight(self, name: str, parts: Parts) -> LazyTensor:
        codes, scale = parts.take(self.parts[0], "float8_e4m3fn", 2), parts.take(self.parts[1], "float")
        if self.block is None:
            parts.expect(math.prod(scale.shape) == 1, f"{self.parts[1]} must have one entry")
            return scaled_tensor(name, "FP8", codes, float(scalar(scale)), parts)
        return self._in_blocks(name, codes, scale, 1, parts)

    def combined(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        result = super().combined(tensors)
        # Stacked experts have no `.weight` at the end of their names.
        for name in [name for name in result if name.endswith("_proj_scale_inv")]:
            stem = name.removesuffix("_scale_inv")
            found = {end: result.pop(stem + end, None) for end in ("", "_scale_inv", "_activation_scale")}
            own = {end: tensor for end, tensor in found.items() if tensor is not None}
            result[stem] = self._stacked(stem, Parts(stem, own, separator=""))
        return result

    def _stacked(self, name: str, parts: Parts) -> LazyTensor:
        """The weights of all experts, each of which has a scale or the scales of its blocks."""
        codes, scale = parts.take("", "float8_e4m3fn", 3), parts.take("_scale_inv", "float", 3)
        experts, rows, _ = codes.shape
        if self.block is None:
            parts.expect(scale.shape == (experts, 1, 1), "an expert must have one scale")
            flat = scaled_tensor(name, "FP8", codes, _ExpertScales(scale, rows), parts)
            return StackedTensor(flat, codes.shape)
        return StackedTensor(self._in_blocks(name, codes, scale, experts, parts), codes.shape)

    def _in_blocks(self, name: str, codes: LazyTensor, scale: LazyTensor, experts: int, parts: Parts) -> BlockTensor:
        assert self.block is not None
        (*_, rows, inputs), (height, width) = codes.shape, self.block
        down, across = -(-rows // height), -(-inputs // width)
        parts.expect(scale.shape[-2:] == (down, across), f"blocks have {height} x {width} numbers")
        parts.expect(math.prod(scale.shape[:-2]) == experts, "each expert must have its own scales")
        if inputs % width:
            raise InputError(
                f"The weight {parts.stem!r} has {inputs} inputs in blocks of {width}, of which the last is not whole, "
                "which is not supported.",
                key=name,
            )
        every_scale = functools.cache(lambda: everything(scale).astype(np.float32).reshape(experts * down, across))

        def read(start: int, stop: int) -> np.ndarray:
            raw = matrix_rows(codes, start, stop).view(np.uint8).reshape(stop - start, -1, width)
            row = np.arange(start, stop)
            own = every_scale()[row // rows * down + row % rows // height]
            return np.concatenate([np.ascontiguousarray(own[..., None]).view(np.uint8), raw], axis=-1)

        return BlockTensor(name, (experts * rows, inputs), f"FP8/{width}", read, parts.nbytes)


class _ExpertScales(LazyTensor):
    """For each row of stacked matrices, the scale of its matrix."""

    def __init__(self, scale: LazyTensor, rows: int):
        super().__init__(scale.name, (scale.shape[0] * rows,), np.dtype(np.float32), "F32", scale.nbytes)
        self._scale = scale
        self._rows = rows

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        return everything(self._scale).astype(np.float32).reshape(-1)[np.arange(start, stop) // self._rows]
