"""The safetensors format: a length, a JSON header, and the tensors' bytes one after the other."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .ranges import of_columns, read_ranges
from .reader import DTYPES, LazyTensor


_STORED = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}
_NAMES = {dtype: stored for stored, dtype in _STORED.items()}

# The limit of the format's own library, which keeps a garbage length from being believed.
_LONGEST_HEADER = 100_000_000


class PlainTensor(LazyTensor):
    """Numbers that lie in a file as they are in memory."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype, stored: str, path: Path, offset: int):
        super().__init__(name, shape, dtype, stored, math.prod(shape) * dtype.itemsize)
        self._path = path
        self._offset = offset

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        count, row_bytes = stop - start, self.nbytes // max(self.shape[0], 1)
        offset = self._offset + start * row_bytes
        if columns is None:
            result = np.empty((count, *self.shape[1:]), self.dtype)
            ranges = [(offset, result.nbytes)]
        else:
            result = np.empty((count, len(columns)), self.dtype)
            ranges = of_columns(offset, count, row_bytes, columns, self.dtype.itemsize)
        read_ranges(self._path, ranges, result)
        return result


def read_header(path: Path) -> dict[str, LazyTensor]:
    """Reads which tensors a safetensors file holds.

    **Arguments:**

    - `path`: the file.

    **Returns:** its tensors by name.

    **Raises:** `ValueError` if the file is not of that format, is truncated, or holds a dtype that is not supported.
    """
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{str(path)!r} is empty; fetch it again.")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LONGEST_HEADER:
            raise InputError(f"{str(path)!r} is not a safetensors file: it does not begin with the length of a header.")
        if 8 + length > size:
            raise InputError(_truncated(path, 8 + length, size))
        header = file.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        described = {name: _describe(entry) for name, entry in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{str(path)!r} is not a safetensors file: its header cannot be read ({error}).") from error
    tensors: dict[str, LazyTensor] = {}
    end = 0
    # The format leaves no gap between tensors and lets none share bytes: each begins where the one before it ends.
    for name, (stored, shape, start, stop) in sorted(described.items(), key=lambda item: item[1][2:]):
        if stored not in _STORED:
            raise InputError(
                f"The tensor {name!r} of {str(path)!r} has the dtype {stored}, which is not supported; the supported "
                f"ones are {', '.join(_STORED)}: use an unquantised checkpoint."
            )
        dtype = _STORED[stored]
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise InputError(
                f"{str(path)!r} is damaged: its header puts the tensor {name!r} at bytes {start} to {stop}, which does "
                "not fit its shape or its neighbours; fetch it again."
            )
        end = stop
        tensors[name] = PlainTensor(name, shape, dtype, stored, path, 8 + length + start)
    if 8 + length + end > size:
        raise InputError(_truncated(path, 8 + length + end, size))
    if 8 + length + end < size:
        raise InputError(
            f"{str(path)!r} is damaged: it has {size} bytes, but its header describes {8 + length + end}; fetch it "
            "again."
        )
    return tensors


def _describe(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
        raise InputError("a size is not a whole number")
    return str(entry["dtype"]), shape, start, stop


def _truncated(path: Path, expected: int, size: int) -> str:
    return f"{str(path)!r} is truncated: it has {size} bytes of {expected}; fetch it again."


def write(
    path: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype, Iterator[np.ndarray]]],
):
    """Writes a safetensors file without holding it in memory.

    **Arguments:**

    - `path`: the file.
    - `tensors`: for each tensor its name, shape, dtype, and arrays whose bytes make up its own; they are taken from
        the iterator as they are written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    tensors = list(tensors)
    for name, shape, dtype, _ in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, _, _, chunks in tensors:
            for chunk in chunks:
                file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
