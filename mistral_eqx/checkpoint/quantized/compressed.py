"""Folders by compressed-tensors."""

import dataclasses
import functools
import math

import numpy as np

from ...errors import InputError
from ...quant import integer_blocks
from ..block_tensor import BlockTensor
from ..reader import LazyTensor
from .parts import (
    Parts,
    Quantization,
    RowScales,
    as_float32,
    codes_of,
    everything,
    scalar,
    scaled_tensor,
    sorted_inputs,
)


@dataclasses.dataclass(frozen=True)
class CompressedTensors(Quantization):
    """Weights as the package compressed-tensors writes them: integers of 2 to 8 bits, FP8 and NVFP4.

    **Attributes:**

    - `bits`: of a whole number.
    """

    bits: int
    parts = (
        "weight",
        "weight_scale",
        "weight_zero_point",
        "weight_packed",
        "weight_shape",
        "weight_g_idx",
        "weight_global_scale",
        "input_global_scale",
        "input_scale",
        "input_zero_point",
    )

    def weight(self, name: str, parts: Parts) -> LazyTensor:
        if parts.has("weight_global_scale"):
            return self._nvfp4(name, parts)
        if parts.has("weight_packed"):
            return self._packed(name, parts)
        kind = parts.take("weight", parts.tensors["weight"].dtype.name if parts.has("weight") else "int8", 2)
        if kind.dtype.name not in ("int8", "float8_e4m3fn"):
            raise InputError(
                f"The weight {parts.stem!r} has a scale but is {kind.dtype.name}, which is not supported; supported "
                "are int8 and float8_e4m3fn.",
                key=name,
            )
        scale = parts.take("weight_scale", "float")
        format = "INT8" if kind.dtype.name == "int8" else "FP8"
        if parts.has("weight_zero_point") and np.any(everything(parts.tensors["weight_zero_point"]) != 0):
            raise InputError(
                f"The weight {parts.stem!r} has zero points for whole rows, which are not supported; use a "
                "symmetric one.",
                key=name,
            )
        if math.prod(scale.shape) == 1:
            return scaled_tensor(name, format, kind, float(scalar(scale)), parts)
        rows, inputs = kind.shape
        if scale.shape in ((rows,), (rows, 1)):
            return scaled_tensor(name, format, kind, RowScales(scale, 1.0), parts)
        parts.expect(
            len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] > 0 and inputs % scale.shape[1] == 0,
            "one scale a group",
        )
        size = inputs // scale.shape[1]

        def read(start: int, stop: int) -> np.ndarray:
            raw = kind.rows(start, stop).view(np.uint8).reshape(stop - start, -1, size)
            own = as_float32(scale, start, stop)[..., None]
            if format == "INT8":
                return integer_blocks(raw ^ 0x80, own, np.full(own.shape, 128, np.uint8), 8)
            return np.concatenate([np.ascontiguousarray(own).view(np.uint8), raw], axis=-1)

        return BlockTensor(name, (rows, inputs), f"{format}/{size}", read, parts.nbytes)

    def _packed(self, name: str, parts: Parts) -> LazyTensor:
        words, scale = parts.take("weight_packed", "int32", 2), parts.take("weight_scale", "float", 2)
        shape = parts.take("weight_shape", "int64", 1)
        parts.expect(shape.shape == (2,), "weight_shape has two sizes")
        rows, inputs = (int(size) for size in everything(shape))
        parts.expect(
            words.shape == (rows, -(-inputs * self.bits // 32)), f"weight_packed has {self.bits} bits a number"
        )
        whole = scale.shape[0] == rows and scale.shape[1] > 0 and inputs % scale.shape[1] == 0
        parts.expect(whole, "weight_scale has one scale a group")
        groups, size = scale.shape[1], inputs // scale.shape[1]
        order = sorted_inputs(parts, "weight_g_idx", inputs, size)
        zeros = parts.take("weight_zero_point", "int32", 2) if parts.has("weight_zero_point") else None
        if zeros is not None:
            fits = zeros.shape == (-(-rows * self.bits // 32), groups)
            parts.expect(fits, f"weight_zero_point has {self.bits} bits for each row and group")

        every_zero = functools.cache(lambda: None if zeros is None else codes_of(everything(zeros).T, self.bits, rows))

        if groups == 1 and self.bits == 8 and zeros is None and order is None:
            # A row's scale stands beside the codes, so that devices can split the row.
            def signed(start: int, stop: int) -> np.ndarray:
                return (codes_of(words.rows(start, stop), self.bits, inputs) ^ 0x80)[..., None]

            return BlockTensor(name, (rows, inputs), "INT8", signed, parts.nbytes, RowScales(scale, 1.0))

        def read(start: int, stop: int) -> np.ndarray:
            codes = codes_of(words.rows(start, stop), self.bits, inputs)
            codes = codes if order is None else codes[:, order]
            found = every_zero()
            zero = (
                np.full((groups, stop - start), 2 ** (self.bits - 1), np.uint8)
                if found is None
                else found[:, start:stop]
            )
            own = as_float32(scale, start, stop)[..., None]
            return integer_blocks(codes.reshape(stop - start, groups, size), own, zero.T[..., None], self.bits)

        return BlockTensor(name, (rows, inputs), f"INT{self.bits}/{size}", read, parts.nbytes, order=order)

    def _nvfp4(self, name: str, parts: Parts) -> LazyTensor:
        codes, scale = parts.take("weight_packed", "uint8", 2), parts.take("weight_scale", "float8_e4m3fn", 2)
        rows, inputs = codes.shape[0], codes.shape[1] * 2
        parts.expect(scale.shape == (rows, inputs // 16) and inputs % 16 == 0, "16 numbers share a scale")

        def read(start: int, stop: int) -> np.ndarray:
            raw = codes.rows(start, stop).reshape(stop - start, -1, 8)
            return np.concatenate([scale.rows(start, stop).view(np.uint8)[..., None], raw], axis=-1)

        overall = parts.take("weight_global_scale", "float")
        parts.expect(math.prod(overall.shape) == 1, "weight_global_scale must have one entry")
        with np.errstate(divide="ignore"):
            factor = float(np.float32(1) / scalar(overall))
        return BlockTensor(name, (rows, inputs), "NVFP4", read, parts.nbytes, factor)
