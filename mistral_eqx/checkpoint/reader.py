"""A checkpoint as a mapping from names to arrays that are read when they are asked for, row by row."""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..config import MistralConfig
from ..errors import InputError
from .ranges import runs


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
    resident memory for as long as the mapping stands. And it should read what it is asked for and no more: that is all
    of the file that a process with a part of the model has to do with.

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
    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        """Reads rows of the first axis into a new array that nobody else holds.

        **Arguments:**

        - `start`, `stop`: rows `start` to `stop - 1`.
        - `columns`: which columns of a matrix, ascending; all of them unless given.
        """

    @property
    def rows_per_chunk(self) -> int:
        """How many rows may be read at once, even by a format that has to read them whole to find some columns."""
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

    **Raises:** `ValueError` if a token that starts or ends a text is outside the vocabulary.
    """

    path: Path
    format: str
    config: MistralConfig
    dtype: np.dtype
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, Any]

    def __post_init__(self):
        name = {"hf": "config.json", "mistral": "params.json"}.get(self.format)
        file = self.path if name is None else self.path / name
        for token in (self.config.bos_id, *self.config.eos_ids):
            if token is not None and token >= self.config.vocab:
                raise InputError(
                    f"{str(file)!r} says that the token {token} starts or ends a text, but its vocabulary has "
                    f"{self.config.vocab} tokens, from 0; correct the id there.",
                    file=file,
                )


def main_dtype(tensors: Mapping[str, LazyTensor]) -> np.dtype:
    """The dtype in which most entries are stored; float32 if there are none."""
    entries: dict[np.dtype, int] = {}
    for tensor in tensors.values():
        entries[tensor.dtype] = entries.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(entries, key=lambda dtype: entries[dtype], default=DTYPES["float32"])


def read_rows(
    tensor: LazyTensor, dtype: np.dtype, *, rows: np.ndarray | None = None, check: bool = False
) -> np.ndarray:
    """Reads rows of a tensor in any order, a chunk at a time, and casts them on the way.

    **Arguments:**

    - `tensor`: a matrix or a vector in a file.
    - `dtype`: the dtype of the result.
    - `rows`: which rows of the file make the rows of the result, each at most once; all in their order unless given.
    - `check`: whether NaN and infinity are refused.

    **Returns:** a new array, which begins where a device of the CPU backend can use it without a copy.

    **Raises:** `ValueError` that names the tensor, if `check` finds something.
    """
    return read_columns(tensor, dtype, [None], rows=rows, check=check)[0]


def read_columns(
    tensor: LazyTensor,
    dtype: np.dtype,
    columns: Sequence[np.ndarray | None],
    *,
    rows: np.ndarray | None = None,
    check: bool = False,
) -> list[np.ndarray]:
    """Reads several sets of columns of the same rows at once, as `read_rows` does with all columns.

    Sets that stand side by side in the file are read in one piece: one by one, their rows would be many small reads.

    **Arguments:**

    - `columns`: for each result, which columns of the file make its columns; all in their order if `None`.
    """
    count = tensor.shape[0] if rows is None else len(rows)
    if rows is None or np.array_equal(rows, np.arange(count) + (rows[0] if count else 0)):
        places, sources = None, np.arange(count) + (0 if rows is None or not count else int(rows[0]))
    else:
        places = np.argsort(rows)
        sources = rows[places]
    together = None
    if all(some is not None for some in columns):
        together = np.unique(np.concatenate([some for some in columns if some is not None]))
        together = None if len(together) == tensor.shape[1] else together
    picks = [_picked(some, together) for some in columns]
    results = [_aligned((count, *(tensor.shape[1:] if some is None else some.shape)), dtype) for some in columns]
    for start, stop in runs(sources, tensor.rows_per_chunk):
        first = int(sources[start])
        block = tensor.rows(first, first + stop - start, together)
        # A number too large for float16 becomes infinity, which `check` finds.
        with np.errstate(over="ignore"):
            block = block.astype(dtype, copy=False)
        if check and not np.isfinite(block).all():
            raise InputError(
                f"The tensor {tensor.name!r} holds NaN or infinity among its rows {first} to {first + stop - start - 1}"
                f" (as {dtype.name}); the file is damaged or was written by a training run that diverged: fetch it "
                "again, or load it without the check."
            )
        for result, picked in zip(results, picks, strict=True):
            result[slice(start, stop) if places is None else places[start:stop]] = block[(slice(None), *picked)]
    return results


def _picked(columns: np.ndarray | None, together: np.ndarray | None) -> tuple[slice | np.ndarray, ...]:
    """Where columns stand among those that are read `together`, which are all of them if it is `None`."""
    if columns is None:
        return ()
    places = columns if together is None else np.searchsorted(together, columns)
    # A slice is copied by rows, an index entry by entry.
    return (slice(places[0], places[-1] + 1) if len(list(runs(places))) == 1 and len(places) else places,)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    # XLA takes over a numpy buffer as it is if it begins at a multiple of 64 bytes, and copies it otherwise.
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)
