"""A checkpoint as a mapping from names to arrays that are read when they are asked for, row by row."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..config import MistralConfig


# How much of a tensor is read, turned into numbers and cast at once: small enough for the allocator to hand out the
# same pages again and again, large enough for a disk.
CHUNK_BYTES = 16 * 2**20

DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class LazyTensor(abc.ABC):
    """A tensor that stays in its file until rows of it are asked for.

    To add a storage format, subclass this and define `rows`. It should read, not map: pages of a mapped file count as
    resident memory for as long as the mapping stands.

    **Attributes:**

    - `name`: the tensor's name in its file.
    - `shape`: its shape.
    - `dtype`: the dtype of the arrays that reading gives.
    - `stored`: what the file calls its element type, such as `"BF16"` or `"Q4_K"`.
    - `nbytes`: its size in the file.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype, stored: str, nbytes: int):
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.stored = stored
        self.nbytes = nbytes

    @abc.abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray:
        """Reads rows `start` to `stop - 1` of the first axis into a new array that nobody else holds."""

    @property
    def rows_per_chunk(self) -> int:
        """How many rows may be read at once."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return max(1, CHUNK_BYTES // max(row_bytes, 1))

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads a part of the tensor, which is told as in numpy by integers, slices and `...`.

        Of the first axis only what lies between the first and the last row asked for is read.
        """
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in parts:
            place = parts.index(Ellipsis)
            parts[place : place + 1] = [slice(None)] * (len(self.shape) - len(parts) + 1)
        first, *rest = parts or [slice(None)]
        wanted = range(self.shape[0])[first]
        if isinstance(wanted, int):
            return np.array(self.rows(wanted, wanted + 1)[(0, *rest)])
        low, high = (min(wanted), max(wanted) + 1) if wanted else (0, 0)
        block = self.rows(low, high)
        picked = slice(wanted.start - low, None, wanted.step) if wanted else slice(None)
        return np.ascontiguousarray(block[(picked, *rest)])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, shape={self.shape}, stored={self.stored!r})"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The files of one model, opened but not read.

    **Attributes:**

    - `path`: the folder or file.
    - `format`: `"hf"`, `"mistral"` or `"gguf"`.
    - `config`: the model's sizes.
    - `dtype`: the files' main dtype; float32 for quantised weights.
    - `tensors`: every tensor by its name in the files.
    - `metadata`: `config.json`, `params.json` or the keys of the GGUF file, as they stand there.
    """

    path: Path
    format: str
    config: MistralConfig
    dtype: np.dtype
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, Any]


def main_dtype(tensors: Mapping[str, LazyTensor]) -> np.dtype:
    """The dtype in which most entries are stored; float32 if there are none."""
    entries: dict[np.dtype, int] = {}
    for tensor in tensors.values():
        entries[tensor.dtype] = entries.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(entries, key=lambda dtype: entries[dtype], default=DTYPES["float32"])


def read_rows(
    tensor: LazyTensor,
    dtype: np.dtype,
    *,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
    check: bool = False,
) -> np.ndarray:
    """Reads rows of a tensor in any order, a chunk at a time, and casts them on the way.

    **Arguments:**

    - `tensor`: a matrix or a vector in a file.
    - `dtype`: the dtype of the result.
    - `rows`: which rows of the file make the rows of the result, each at most once; all in their order unless given.
    - `columns`: likewise for the columns of a matrix.
    - `check`: whether NaN and infinity are refused.

    **Returns:** a new array, which begins where a device of the CPU backend can use it without a copy.

    **Raises:** `ValueError` that names the tensor, if `check` finds something.
    """
    count = tensor.shape[0] if rows is None else len(rows)
    width = tensor.shape[1:] if columns is None else (len(columns),)
    result = _aligned((count, *width), dtype)
    if rows is None or np.array_equal(rows, np.arange(count) + (rows[0] if count else 0)):
        places, sources = None, np.arange(count) + (0 if rows is None or not count else int(rows[0]))
    else:
        places = np.argsort(rows)
        sources = rows[places]
    for start, stop in _runs(sources, tensor.rows_per_chunk):
        first = int(sources[start])
        block = tensor.rows(first, first + stop - start)
        if columns is not None:
            block = block[:, columns]
        # A number too large for float16 becomes infinity, which `check` finds.
        with np.errstate(over="ignore"):
            block = block.astype(dtype, copy=False)
        result[slice(start, stop) if places is None else places[start:stop]] = block
        if check and not np.isfinite(block).all():
            raise ValueError(
                f"The tensor {tensor.name!r} holds NaN or infinity among its rows {first} to {first + stop - start - 1}"
                f" (as {dtype.name}); the file is damaged or was written by a training run that diverged: fetch it "
                "again, or load it without the check."
            )
    return result


def _runs(sources: np.ndarray, longest: int):
    """Cuts ascending row numbers into `start, stop` of consecutive ones, none longer than `longest`."""
    breaks = np.flatnonzero(np.diff(sources) != 1) + 1
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(sources)], strict=True):
        for cut in range(start, stop, longest):
            yield cut, min(cut + longest, stop)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    # XLA takes over a numpy buffer as it is if it begins at a multiple of 64 bytes, and copies it otherwise.
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)
