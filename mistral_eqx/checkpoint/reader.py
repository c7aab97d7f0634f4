"""A checkpoint as a mapping from names to tensors, which are read on demand, row by row."""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..config import MistralConfig
from ..errors import InputError
from .ranges import runs


# The bytes of a tensor that are read and cast at once: few enough for the allocator to reuse the same pages, enough
# for efficient reads from a disk.
CHUNK_BYTES = 16 * 2**20
# How many reads wait for the disk at the same time: a network disk answers each of them late. Those into arrays of
# their own, which are then cast or reordered, are fewer, because each needs memory for a chunk.
READS, READS_WITH_COPY = 8, 2

DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# By their names in files, and as formats of blocks of one number.
FLOATS: Mapping[str, np.dtype] = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}


class LazyTensor(abc.ABC):
    """A tensor in a file, whose rows are read on demand.

    To add a storage format, subclass this and define `rows`. `rows` should read the file and not map it, because the
    pages of a mapped file count as resident memory while the mapping exists. It should read only the requested rows
    and columns, because a process that holds a shard of the model needs no more of the file.

    **Attributes:**

    - `name`: the tensor's name in its file.
    - `shape`: its shape.
    - `dtype`: the dtype of the arrays that `rows` returns.
    - `stored`: the name of its element type in the file, such as `"BF16"` or `"Q4_K"`.
    - `nbytes`: its size in the file.
    - `packed`: how it can be kept as it is, if it is quantized or has 16-bit floats in a model of float32.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype, stored: str, nbytes: int):
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.stored = stored
        self.nbytes = nbytes
        self.packed: Packed | None = None

    @abc.abstractmethod
    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        """Reads rows of the first axis into a new array, which the caller may modify.

        **Arguments:**

        - `start`, `stop`: rows `start` to `stop - 1`.
        - `columns`: the columns of a matrix to read, ascending; by default all.
        """

    def rows_into(self, start: int, into: np.ndarray):
        """Reads as many rows as `into` has, from row `start` on. A format that needs no other array overrides this.

        **Arguments:**

        - `into`: a contiguous array of this tensor's dtype.
        """
        into[...] = self.rows(start, start + len(into))

    def write(self, start: int, block: np.ndarray, columns: np.ndarray | None = None):
        """Writes rows into the file in place. A format that is written so overrides this.

        The rows of a tensor with three axes are those of its matrices, one after the other.

        **Arguments:**

        - `start`: the first row.
        - `block`: the rows, of this tensor's dtype.
        - `columns`: their columns, ascending; by default all.
        """
        raise NotImplementedError(f"{self!r} is only read")

    @property
    def rows_per_chunk(self) -> int:
        """The number of rows that fit in `CHUNK_BYTES`, even if a format reads whole rows to get a few columns."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return max(1, CHUNK_BYTES // max(row_bytes, 1))

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads a part of the tensor, indexed as in numpy by integers, slices and `...`.

        The rows from the first to the last requested one are read.
        """
        axes = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in axes:
            position = axes.index(Ellipsis)
            axes[position : position + 1] = [slice(None)] * (len(self.shape) - len(axes) + 1)
        first, *rest = axes or [slice(None)]
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
class Packed:
    """How a tensor can be kept as it is.

    **Attributes:**

    - `format`: the name of a block format ([`mistral_eqx.quant.block_format`][]).
    - `blocks`: the bytes, a row of blocks in each row.
    - `scale`: a factor of all numbers, or a tensor with one for each row; `None` without.
    - `order`: for each column of the blocks, its column in the weight; `None` if these are the same.
    - `smaller`: the same numbers in smaller blocks, for devices that split the columns; `None` if there are none.
    """

    format: str
    blocks: LazyTensor
    scale: LazyTensor | float | None = None
    order: np.ndarray | None = None
    smaller: LazyTensor | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The files of a model. Their headers have been read, their weights have not.

    **Attributes:**

    - `path`: the folder or file.
    - `format`: `"hf"`, `"mistral"` or `"gguf"`.
    - `config`: the model's sizes.
    - `dtype`: the dtype of a model that keeps the files' types: the main dtype, and float32 for quantised weights. In a
        GGUF file it is that of the matrices if they have one, and otherwise float32.
    - `tensors`: every tensor by its name in the files.
    - `metadata`: the content of `config.json` or `params.json`, or the keys and values of the GGUF file.

    **Raises:** `ValueError` if a beginning-of-sequence or end-of-sequence token is outside the vocabulary.
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
                    f"{str(file)!r} has the beginning-of-sequence or end-of-sequence token {token}, but its vocabulary "
                    f"has {self.config.vocab} tokens, from 0; correct the id there.",
                    file=file,
                )


def main_dtype(tensors: Mapping[str, LazyTensor]) -> np.dtype:
    """The dtype of most entries; float32 if there are none."""
    entries: dict[np.dtype, int] = {}
    for tensor in tensors.values():
        entries[tensor.dtype] = entries.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(entries, key=lambda dtype: entries[dtype], default=DTYPES["float32"])


def read_rows(
    tensor: LazyTensor, dtype: np.dtype, *, rows: np.ndarray | None = None, check: bool = False
) -> np.ndarray:
    """Reads rows of a tensor in any order, in chunks, and casts them.

    **Arguments:**

    - `tensor`: a matrix or a vector in a file.
    - `dtype`: the dtype of the result.
    - `rows`: for each row of the result, its row in the file; no row twice. By default all rows, in the file's order.
    - `check`: whether to refuse NaN and infinity.

    **Returns:** a new array, aligned so that the CPU backend can use it without a copy.

    **Raises:** `ValueError` that names the tensor, if `check` finds NaN or infinity.
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
    """Reads several sets of columns of the same rows; see `read_rows`.

    Several chunks are read at the same time. All sets are read together: one read for adjacent sets replaces many small
    reads.

    **Arguments:**

    - `columns`: for each result, its columns in the file; `None` for all columns.
    """
    count = tensor.shape[0] if rows is None else len(rows)
    if rows is None or np.array_equal(rows, np.arange(count) + (rows[0] if count else 0)):
        order, file_rows = None, np.arange(count) + (0 if rows is None or not count else int(rows[0]))
    else:
        order = np.argsort(rows)
        file_rows = rows[order]
    union = None
    if all(each is not None for each in columns):
        union = np.unique(np.concatenate([each for each in columns if each is not None]))
        union = None if len(union) == tensor.shape[1] else union
    indices = [_index_in(union, each) for each in columns]
    results = [aligned((count, *(tensor.shape[1:] if each is None else each.shape)), dtype) for each in columns]
    as_stored = order is None and indices == [()] and dtype == tensor.dtype

    def read(bounds: tuple[int, int]):
        start, stop = bounds
        first = int(file_rows[start])
        if as_stored:
            block = results[0][start:stop]
            tensor.rows_into(first, block)
        else:
            block = tensor.rows(first, first + stop - start, union)
        # A number too large for float16 becomes infinity, which `check` finds.
        with np.errstate(over="ignore"):
            block = block.astype(dtype, copy=False)
        if check and not np.isfinite(block).all():
            raise InputError(
                f"The tensor {tensor.name!r} holds NaN or infinity among its rows {first} to {first + stop - start - 1}"
                f" (as {dtype.name}); the file is damaged or was written by a training run that diverged: fetch it "
                "again, or load it without the check."
            )
        if as_stored:
            return
        for result, index in zip(results, indices, strict=True):
            result[slice(start, stop) if order is None else order[start:stop]] = block[(slice(None), *index)]

    with ThreadPoolExecutor(READS if as_stored else READS_WITH_COPY) as pool:
        for _ in pool.map(read, runs(file_rows, tensor.rows_per_chunk)):
            pass
    return results


def matrix_rows(tensor: LazyTensor, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
    """Rows of a vector or a matrix, or of the matrices of a tensor with three axes, one after the other."""
    if len(tensor.shape) < 3:
        return tensor.rows(start, stop, columns)
    size = tensor.shape[1]
    first = start // size
    whole = tensor.rows(first, -(-stop // size)).reshape(-1, tensor.shape[-1])
    whole = whole[start - first * size : stop - first * size]
    return whole if columns is None else whole[:, columns]


def _index_in(union: np.ndarray | None, columns: np.ndarray | None) -> tuple[slice | np.ndarray, ...]:
    """The index of columns in the union of all sets; `None` stands for all columns of the tensor."""
    if columns is None:
        return ()
    positions = columns if union is None else np.searchsorted(union, columns)
    # numpy copies a slice row by row, but an index array entry by entry.
    is_run = len(list(runs(positions))) == 1 and len(positions)
    return (slice(positions[0], positions[-1] + 1) if is_run else positions,)


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of any contents, at an address that is a multiple of 64: XLA uses it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)
