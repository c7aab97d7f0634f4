"""The safetensors format: a length, a JSON header, and the tensors' bytes one after the other."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
from annotated_types import Ge

from ..checks import checked
from ..documents import expect_regular, parse_json, shown
from ..errors import InputError
from .ranges import of_columns, read_ranges, write_ranges
from .reader import FLOATS, LazyTensor
from .staging import naming


# What weights that are quantized are made of.
_PACKED = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_NAMES = {dtype: stored for stored, dtype in (*FLOATS.items(), *_PACKED.items())}

# The limit of the safetensors library. It protects against a huge length in a damaged file.
_LONGEST_HEADER = 100_000_000
# An entry has about six commas. The limit bounds memory: empty lists take a hundred times the memory of their text.
_MOST_COMMAS = 2**21
_MOST_AXES = 8
_Size = Annotated[int, Ge(0)]


class PlainTensor(LazyTensor):
    """A tensor whose numbers have the same bytes in the file as in memory."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype, stored: str, path: Path, offset: int):
        super().__init__(name, shape, dtype, stored, math.prod(shape) * dtype.itemsize)
        self._path = path
        self._offset = offset

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        count = stop - start
        if columns is None:
            result = np.empty((count, *self.shape[1:]), self.dtype)
            self.rows_into(start, result)
            return result
        result = np.empty((count, len(columns)), self.dtype)
        ranges = of_columns(self._offset_of(start), count, self._row_bytes, columns, self.dtype.itemsize)
        read_ranges(self._path, ranges, result)
        return result

    def rows_into(self, start: int, into: np.ndarray):
        read_ranges(self._path, [(self._offset_of(start), into.nbytes)], into)

    def write(self, start: int, block: np.ndarray, columns: np.ndarray | None = None):
        row_bytes = math.prod(self.shape[1:][-1:]) * self.dtype.itemsize
        offset = self._offset + start * row_bytes
        ranges = [(offset, block.nbytes)]
        if columns is not None:
            ranges = of_columns(offset, len(block), row_bytes, columns, self.dtype.itemsize)
        with naming(self._path):
            write_ranges(self._path, ranges, np.ascontiguousarray(block))

    @property
    def _row_bytes(self) -> int:
        return self.nbytes // max(self.shape[0] if self.shape else 1, 1)

    def _offset_of(self, row: int) -> int:
        return self._offset + row * self._row_bytes

    def in_bytes(self) -> "PlainTensor":
        """The bytes of a matrix, or of several, a row in each row."""
        *rows, columns = self.shape
        shape = math.prod(rows), columns * self.dtype.itemsize
        return PlainTensor(self.name, shape, np.dtype(np.uint8), self.stored, self._path, self._offset)


def read_header(path: Path, *, packed: bool = False) -> dict[str, LazyTensor]:
    """Reads the header of a safetensors file.

    **Arguments:**

    - `path`: the file.
    - `packed`: whether integers and 8-bit floats are allowed, of which quantized weights are made.

    **Returns:** its tensors by name.

    **Raises:** `InputError` if the file is not a safetensors file, is truncated, or has an unsupported dtype. All
    that the safetensors library refuses is refused, and also duplicate keys.
    """
    expect_regular(path)
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{str(path)!r} is empty; fetch it again.", file=path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LONGEST_HEADER:
            raise InputError(
                f"{str(path)!r} is not a safetensors file: it does not begin with the length of a header.", file=path
            )
        if 8 + length > size:
            raise _truncated(path, 8 + length, size)
        header = file.read(length)
    try:
        described = _described(header)
    except InputError as error:
        raise InputError(
            f"{str(path)!r} is not a safetensors file: its header cannot be read ({str(error).rstrip('.')}).",
            file=path,
            key=error.key,
        ) from error
    tensors: dict[str, LazyTensor] = {}
    known = {**FLOATS, **(_PACKED if packed else {})}
    end = 0
    # The format allows neither gaps nor overlaps: each tensor begins at the end of the previous one.
    for name, entry in sorted(described.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in known:
            raise InputError(
                f"The tensor {shown(name)} of {str(path)!r} has the dtype {shown(entry.dtype)[1:-1]}, which is not "
                f"supported; the supported ones are {', '.join(FLOATS)}: use an unquantised checkpoint.",
                file=path,
                key=name,
            )
        dtype = known[entry.dtype]
        start, stop = entry.data_offsets
        if start != end or stop - start != math.prod(entry.shape) * dtype.itemsize:
            raise InputError(
                f"{str(path)!r} is damaged: its header puts the tensor {shown(name)} at bytes {shown(start)} to "
                f"{shown(stop)}, which does not fit its shape or its neighbours; fetch it again.",
                file=path,
                key=name,
            )
        end = stop
        tensors[name] = PlainTensor(name, entry.shape, dtype, entry.dtype, path, 8 + length + start)
    if 8 + length + end > size:
        raise _truncated(path, 8 + length + end, size)
    if 8 + length + end < size:
        raise InputError(
            f"{str(path)!r} is damaged: it has {size} bytes, but its header describes {8 + length + end}; fetch it "
            "again.",
            file=path,
        )
    return tensors


@dataclasses.dataclass(frozen=True)
class _Entry:
    """The header entry of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _described(header: bytes) -> dict[str, _Entry]:
    """Parses a header into entries by tensor name."""
    if header.count(b",") > _MOST_COMMAS:
        raise InputError("it has more entries than any model's; fetch it again.")
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"it is not UTF-8 text, {error.reason}; fetch it again.") from error
    entries = parse_json(text, "it")
    if not isinstance(entries, dict):
        raise InputError(f"it must be a JSON object, not {shown(entries)}; fetch it again.")
    if (notes := entries.pop("__metadata__", None)) is not None:
        checked(notes, dict[str, str], "its __metadata__", key="__metadata__")
    return {name: _entry(name, entry) for name, entry in entries.items()}


def _entry(name: str, entry: Any) -> _Entry:
    def of(key: str, kind: Any) -> Any:
        found = entry.get(key) if isinstance(entry, dict) else None
        return checked(found, kind, f"{key!r} of the tensor {shown(name)}", key=name, remedy="fetch it again")

    shape, offsets = of("shape", list[_Size]), of("data_offsets", list[_Size])
    if len(offsets) != 2 or len(shape) > _MOST_AXES:
        raise InputError(
            f"the tensor {shown(name)} has {len(shape)} axes and {len(offsets)} offsets, but at most {_MOST_AXES} axes "
            "and two offsets are possible; fetch it again.",
            key=name,
        )
    return _Entry(of("dtype", str), tuple(shape), (offsets[0], offsets[1]))


def _truncated(path: Path, expected: int, size: int) -> InputError:
    return InputError(
        f"{str(path)!r} is truncated: it has {size} bytes of {shown(expected)}; fetch it again.", file=path
    )


def create(path: Path, tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]]):
    """Creates a safetensors file of its full size, into whose tensors `PlainTensor.write` puts the numbers.

    **Arguments:**

    - `path`: the file.
    - `tensors`: the name, shape and dtype of each tensor.
    """
    header, size = _header(tensors)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def write(
    path: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype, Iterator[np.ndarray]]],
):
    """Writes a safetensors file, one chunk in memory at a time.

    **Arguments:**

    - `path`: the file.
    - `tensors`: for each tensor its name, shape, dtype, and an iterator of chunks. The bytes of the chunks together are
        the bytes of the tensor; each chunk is written before the next is requested.
    """
    tensors = list(tensors)
    header, _ = _header(described for *described, _ in tensors)
    with open(path, "wb") as file:
        file.write(header)
        for *_, chunks in tensors:
            for chunk in chunks:
                file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)


def _header(tensors: Iterable[Sequence[Any]]) -> tuple[bytes, int]:
    """The bytes before the tensors of a file, and the size of all tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, dtype in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end
