"""What all quantized forms share: several tensors of a file that are one weight."""

import abc
import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from ...errors import InputError
from ...quant import unpack
from ..block_tensor import BlockTensor
from ..reader import LazyTensor, matrix_rows


class Quantization(abc.ABC):
    """How a checkpoint is quantized."""

    # The tensors of a weight, by the end of their names.
    parts: tuple[str, ...]

    @abc.abstractmethod
    def weight(self, name: str, parts: "Parts") -> LazyTensor:
        """One tensor of several.

        **Arguments:**

        - `name`: the name that it would have in a checkpoint that is not quantized.
        - `parts`: its tensors, by the end of their names.
        """

    def combined(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """All tensors of a checkpoint, those of each quantized weight as one."""
        found: dict[str, dict[str, LazyTensor]] = {}
        result: dict[str, LazyTensor] = {}
        ends = sorted(self.parts, key=len, reverse=True)
        for name, tensor in tensors.items():
            end = next((end for end in ends if name.endswith(f".{end}")), None)
            if end is None:
                result[name] = tensor
            else:
                found.setdefault(name.removesuffix(f".{end}"), {})[end] = tensor
        for stem, own in found.items():
            name = f"{stem}.weight"
            # Norms and layers that are not quantized have a weight and nothing else.
            plain = set(own) == {"weight"} and own["weight"].dtype.kind not in "iu" and own["weight"].dtype.itemsize > 1
            result[name] = own["weight"] if plain else self.weight(name, Parts(stem, own))
        return result


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tensors of a quantized weight.

    **Attributes:**

    - `stem`: what their names begin with.
    - `tensors`: the tensors by the end of their names.
    - `separator`: what is between the two.
    """

    stem: str
    tensors: Mapping[str, LazyTensor]
    separator: str = "."

    def name(self, end: str) -> str:
        """The whole name of a tensor."""
        return f"{self.stem}{self.separator}{end}"

    def take(self, end: str, dtype: str, axes: int | None = None) -> LazyTensor:
        """A tensor of the weight, checked against its kind of numbers.

        **Arguments:**

        - `end`: the end of its name.
        - `dtype`: the name of a numpy dtype, or `"float"` for any float of 16 or 32 bits.
        - `axes`: how many axes it must have; any number unless given.
        """
        if end not in self.tensors:
            raise InputError(
                f"The weight {self.stem!r} has no tensor {self.name(end)!r}, which its quantization requires; "
                "fetch the checkpoint again.",
                key=self.name(end),
            )
        tensor = self.tensors[end]
        fits = (
            tensor.dtype.name in ("float32", "float16", "bfloat16") if dtype == "float" else tensor.dtype.name == dtype
        )
        if not fits or (axes is not None and len(tensor.shape) != axes):
            wanted = dtype if axes is None else f"{dtype} with {axes} axes"
            raise InputError(
                f"The tensor {self.name(end)!r} is {tensor.dtype.name} of shape {tensor.shape}, but its "
                f"quantization requires {wanted}; the config belongs to another checkpoint.",
                key=self.name(end),
            )
        return tensor

    def has(self, end: str) -> bool:
        """Whether there is such a tensor."""
        return end in self.tensors

    @property
    def nbytes(self) -> int:
        """The size of all of them in the files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def expect(self, fits: bool, what: str):
        """Refuses tensors that do not fit each other."""
        if not fits:
            shapes = ", ".join(f"{end} {tensor.shape}" for end, tensor in self.tensors.items())
            raise InputError(
                f"The tensors of the weight {self.stem!r} do not fit each other ({shapes}): {what}; fetch the "
                "checkpoint again.",
                key=f"{self.stem}.weight",
            )


def everything(tensor: LazyTensor) -> np.ndarray:
    return tensor.rows(0, tensor.shape[0])


def some_columns(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
    """All rows of some columns."""
    return tensor.rows(0, tensor.shape[0], np.arange(start, stop))


def as_float32(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
    return tensor.rows(start, stop).astype(np.float32)


def codes_of(words: np.ndarray, bits: int, count: int | None = None) -> np.ndarray:
    """The codes in 32-bit words of the last axis, one after the other, the lowest bit first; `count` if given."""
    return unpack(np.ascontiguousarray(words, "<i4").view(np.uint8), bits, count)


def sorted_inputs(parts: Parts, end: str, inputs: int, size: int) -> np.ndarray | None:
    """The inputs group after group, by the group of each; `None` if they are so already."""
    if not parts.has(end):
        return None
    group = everything(parts.take(end, "int32", 1))
    full = len(group) == inputs and np.array_equal(np.sort(group), np.arange(inputs) // size)
    parts.expect(full, f"{end} must give each of {inputs // size} groups {size} inputs")
    order = np.argsort(group, kind="stable")
    return None if np.array_equal(order, np.arange(inputs)) else order


class RowScales(LazyTensor):
    """The scales of rows, on one axis."""

    def __init__(self, scale: LazyTensor, factor: float):
        super().__init__(scale.name, scale.shape[:1], np.dtype(np.float32), "F32", scale.nbytes)
        self._scale = scale
        self._factor = np.float32(factor)

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        return as_float32(self._scale, start, stop).reshape(-1) * self._factor


def scaled_tensor(name: str, format: str, codes: LazyTensor, scale: LazyTensor | float, parts: Parts) -> BlockTensor:
    def read(start: int, stop: int) -> np.ndarray:
        return matrix_rows(codes, start, stop).view(np.uint8)[..., None]

    *rows, inputs = codes.shape
    return BlockTensor(name, (math.prod(rows), inputs), format, read, parts.nbytes, scale)


def scalar(tensor: LazyTensor) -> np.float32:
    return np.float32(tensor.rows(0, 1).reshape(-1)[0])
