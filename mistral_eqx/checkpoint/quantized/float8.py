"""Folders in FP8."""

import dataclasses
import functools
import math

import numpy as np

from ...errors import InputError
from ..block_tensor import BlockTensor
from ..reader import LazyTensor
from .parts import Parts, Quantization, everything, scalar, scaled_tensor


@dataclasses.dataclass(frozen=True)
class FP8Weights(Quantization):
    """Floats of 8 bits (e4m3) with a scale for all, or for each block of rows and columns.

    **Attributes:**

    - `block`: rows and columns of a block; `None` for one scale.
    """

    block: tuple[int, int] | None
    parts = ("weight", "weight_scale_inv", "activation_scale")

    def weight(self, name: str, parts: Parts) -> LazyTensor:
        codes, scale = parts.take("weight", "float8_e4m3fn", 2), parts.take("weight_scale_inv", "float")
        if self.block is None:
            parts.expect(math.prod(scale.shape) == 1, "weight_scale_inv must have one entry")
            return scaled_tensor(name, "FP8", codes, float(scalar(scale)), parts)
        (rows, inputs), (height, width) = codes.shape, self.block
        parts.expect(
            scale.shape == (-(-rows // height), -(-inputs // width)), f"blocks have {height} x {width} numbers"
        )
        if inputs % width:
            raise InputError(
                f"The weight {parts.stem!r} has {inputs} inputs in blocks of {width}, of which the last is not whole, "
                "which is not supported.",
                key=name,
            )
        every_scale = functools.cache(lambda: everything(scale).astype(np.float32))

        def read(start: int, stop: int) -> np.ndarray:
            raw = codes.rows(start, stop).view(np.uint8).reshape(stop - start, -1, width)
            own = every_scale()[np.arange(start, stop) // height]
            return np.concatenate([np.ascontiguousarray(own[..., None]).view(np.uint8), raw], axis=-1)

        return BlockTensor(name, (rows, inputs), f"FP8/{width}", read, parts.nbytes)
