"""Folders by GPTQ and AWQ: groups of inputs with a scale and a zero."""

import dataclasses
import functools

import numpy as np

from ...quant import integer_blocks
from ..block_tensor import BlockTensor
from ..reader import LazyTensor
from .parts import Parts, Quantization, codes_of, everything, some_columns, sorted_inputs


@dataclasses.dataclass(frozen=True)
class GPTQ(Quantization):
    """Groups of inputs with a scale and a zero; with `desc_act`, inputs belong to groups in any order.

    **Attributes:**

    - `bits`, `group_size`: of a code, and how many inputs share a scale; -1 for all of them.
    - `v2`: whether zeros are stored as they are, and not less one.
    """

    bits: int
    group_size: int
    v2: bool
    parts = ("qweight", "qzeros", "scales", "g_idx", "weight")

    def weight(self, name: str, parts: Parts) -> LazyTensor:
        words, scales, zeros = (parts.take(end, kind, 2) for end, kind in _GPTQ)
        inputs, rows = words.shape[0] * 32 // self.bits, words.shape[1]
        whole = words.shape[0] * 32 % self.bits == 0 and rows * self.bits % 32 == 0
        parts.expect(whole, f"words hold codes of {self.bits} bits")
        size = inputs if self.group_size == -1 else self.group_size
        parts.expect(inputs % size == 0 and size % 8 == 0, f"groups of {size} must divide {inputs} inputs")
        groups = inputs // size
        parts.expect(scales.shape == (groups, rows), f"scales must have shape {(groups, rows)}")
        width = rows * self.bits // 32
        parts.expect(zeros.shape == (groups, width), f"qzeros must have shape {(groups, width)}")
        order = sorted_inputs(parts, "g_idx", inputs, size)
        every_zero = functools.cache(lambda: codes_of(everything(zeros), self.bits))

        def read(start: int, stop: int) -> np.ndarray:
            codes = codes_of(np.ascontiguousarray(some_columns(words, start, stop).T), self.bits)
            codes = codes if order is None else codes[:, order]
            zero = every_zero()[:, start:stop].T + np.uint8(0 if self.v2 else 1)
            scale = some_columns(scales, start, stop).astype(np.float32).T
            return integer_blocks(
                codes.reshape(stop - start, groups, size), scale[..., None], zero[..., None], self.bits
            )

        return BlockTensor(name, (rows, inputs), f"INT{self.bits}/{size}", read, parts.nbytes, order=order)


_GPTQ = (("qweight", "int32"), ("scales", "float"), ("qzeros", "int32"))
# Which output each 4 bits of a word of AWQ belong to, from the lowest.
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


@dataclasses.dataclass(frozen=True)
class AWQ(Quantization):
    """Groups of inputs in 4 bits with a scale and a zero, in the layout that AutoAWQ calls gemm."""

    group_size: int
    parts = ("qweight", "qzeros", "scales", "weight")

    def weight(self, name: str, parts: Parts) -> LazyTensor:
        words, scales, zeros = (parts.take(end, kind, 2) for end, kind in _GPTQ)
        inputs, rows = words.shape[0], words.shape[1] * 8
        size = inputs if self.group_size == -1 else self.group_size
        parts.expect(inputs % size == 0 and size % 8 == 0, f"groups of {size} must divide {inputs} inputs")
        groups = inputs // size
        parts.expect(scales.shape == (groups, rows), f"scales must have shape {(groups, rows)}")
        parts.expect(zeros.shape == (groups, words.shape[1]), f"qzeros must have shape {(groups, words.shape[1])}")

        def of_rows(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
            first, last = start // 8, -(-stop // 8)
            codes = codes_of(some_columns(tensor, first, last), 4).reshape(tensor.shape[0], -1, 8)
            codes = codes[:, :, np.argsort(_AWQ_ORDER)].reshape(tensor.shape[0], -1)
            return codes[:, start - 8 * first : stop - 8 * first].T

        def read(start: int, stop: int) -> np.ndarray:
            codes = np.ascontiguousarray(of_rows(words, start, stop)).reshape(stop - start, groups, size)
            scale = some_columns(scales, start, stop).astype(np.float32).T
            return integer_blocks(codes, scale[..., None], of_rows(zeros, start, stop)[..., None], 4)

        return BlockTensor(name, (rows, inputs), f"INT4/{size}", read, parts.nbytes)
