"""The header of a GGUF file: keys and values, and the offset of each tensor."""

import dataclasses
import struct
from typing import IO, Any, NoReturn

from gguf import GGUFValueType

from ..documents import DEEPEST, shown
from ..errors import InputError


_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
# Real headers have a few megabytes, some hundred thousand values and some hundred tensors. The limit on values is
# needed because a value of one byte in the file can take a hundred bytes in memory.
_LONGEST = 100_000_000
_MOST_VALUES = 4 * 2**20
_MOST_TENSORS = 2**17
_MOST_AXES = 8
_ALIGNMENT = "general.alignment"
_CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The header entry of a tensor: its shape (outermost axis first), its element type and its offset in the data."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    """A header: values by key, tensors by name, the alignment of tensors, and the offset of the header's end."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    alignment: int
    end: int


def read_header(file: IO[bytes], size: int) -> Header:
    """Reads the header of a GGUF file after its magic number.

    **Arguments:**

    - `file`: the open file, at the byte after the magic number.
    - `size`: the size of the file in bytes.

    **Raises:** `InputError` whose message lacks its subject, the file, which the caller puts in front; `EOFError` if
    the header is longer than the file.
    """
    return _Cursor(file, size).header()


def _damaged(problem: str, key: str | None = None) -> NoReturn:
    raise InputError(f"is damaged: {problem}; fetch it again.", key=key)


def shortest(value: float) -> float:
    """The shortest decimal that a float32 of the file stands for: 1e-05 for 9.99999974e-06."""
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    for digits in range(1, 10):
        candidate = float(f"{single:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", candidate))[0] == single:
            return candidate
    return single


class _Cursor:
    """A position in the header. The cursor reads bytes on demand, and allocates no values before it has read them."""

    def __init__(self, file: IO[bytes], size: int):
        self._file = file
        self._size = size
        self._begin = file.tell()
        self._content = b""
        self._at = 0
        self._values = 0

    def header(self) -> Header:
        version = self._number("I")
        if version not in (2, 3):
            raise InputError(f"is GGUF of version {version}; supported are 2 and 3, little-endian.")
        tensors, pairs = self._number("Q"), self._number("Q")
        # A tensor takes at least 24 bytes, a key with its value takes at least 13.
        if 24 * tensors + 13 * pairs > self._size:
            raise EOFError
        if tensors > _MOST_TENSORS or pairs > _MOST_TENSORS:
            _damaged(f"its header counts {tensors} tensors and {pairs} keys, more than a model has")
        metadata: dict[str, Any] = {}
        alignment = 32
        for number in range(pairs):
            key = self._name(f"key number {number}")
            if key in metadata:
                _damaged(f"it has the key {shown(key)} twice", key)
            kind = self._number("I")
            metadata[key] = self._value(kind, key, 0)
            if key == _ALIGNMENT:
                alignment = metadata[key]
                if kind != GGUFValueType.UINT32 or alignment < 1 or alignment & (alignment - 1):
                    _damaged(f"its {_ALIGNMENT} is {shown(alignment)}, and not a power of two", key)
        infos: dict[str, TensorInfo] = {}
        for number in range(tensors):
            name = self._name(f"the name of tensor number {number}")
            if name in infos:
                _damaged(f"it holds two tensors {shown(name)}", name)
            rank = self._number("I")
            if rank > _MOST_AXES:
                _damaged(f"its tensor {shown(name)} has {rank} axes", name)
            axes = [self._number("Q") for _ in range(rank)]
            # The file stores the innermost axis first.
            infos[name] = TensorInfo(tuple(reversed(axes)), self._number("I"), self._number("Q"))
        return Header(metadata, infos, alignment, self._begin + self._at)

    def _take(self, count: int) -> int:
        """Reads the next `count` bytes if needed, and returns the offset of the first."""
        start, stop = self._at, self._at + count
        if stop > len(self._content):
            if self._begin + stop > self._size:
                raise EOFError
            if stop > _LONGEST:
                _damaged(f"its header is longer than {_LONGEST // 10**6} MB, more than any model's")
            self._content += self._file.read(max(stop - len(self._content), len(self._content), _CHUNK))
            if stop > len(self._content):
                raise EOFError
        self._at = stop
        return start

    def _number(self, code: str) -> Any:
        start = self._take(struct.calcsize(f"<{code}"))
        (value,) = struct.unpack_from(f"<{code}", self._content, start)
        return value

    def _text(self) -> bytes:
        length = self._number("Q")
        start = self._take(length)
        return self._content[start : start + length]

    def _name(self, description: str) -> str:
        content = self._text()
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            _damaged(f"{description} is not UTF-8 text: {shown(content)}")

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind == GGUFValueType.STRING:
            (text,) = self._texts(1)
            return text
        if kind == GGUFValueType.ARRAY:
            return self._array(key, depth)
        if kind not in _SCALARS:
            _damaged(f"the value of its key {shown(key)} has the unknown type {kind}", key)
        return self._number(_SCALARS[GGUFValueType(kind)])

    def _array(self, key: str, depth: int) -> list[Any]:
        element, count = self._number("I"), self._number("Q")
        if element not in _SCALARS and element not in (GGUFValueType.STRING, GGUFValueType.ARRAY):
            _damaged(f"the array of its key {shown(key)} has entries of the unknown type {element}", key)
        code = _SCALARS.get(GGUFValueType(element))
        # A string has at least its length, an array its type and its length.
        smallest = 8 if element == GGUFValueType.STRING else 12 if code is None else struct.calcsize(f"<{code}")
        if self._begin + self._at + count * smallest > self._size:
            raise EOFError
        self._values += count
        if self._values > _MOST_VALUES:
            _damaged(
                f"the arrays up to its key {shown(key)} have {self._values} entries, more than those of a model", key
            )
        if depth == DEEPEST:
            _damaged(f"the arrays of its key {shown(key)} nest deeper than {DEEPEST} levels", key)
        if code is not None:
            start = self._take(count * smallest)
            return list(struct.unpack_from(f"<{count}{code}", self._content, start))
        if element == GGUFValueType.STRING:
            return self._texts(count)
        return [self._array(key, depth + 1) for _ in range(count)]

    def _texts(self, count: int) -> list[str]:
        """Reads consecutive strings in one loop, for speed: a vocabulary has a hundred thousand of them."""
        found: list[str] = []
        content, at, available = self._content, self._at, len(self._content)
        for _ in range(count):
            start = at + 8
            stop = start + int.from_bytes(content[at:start], "little")
            if stop > available or start > available:
                self._at = at
                self._take(8)
                self._take(int.from_bytes(self._content[at:start], "little"))
                content, stop, available = self._content, self._at, len(self._content)
            # A token may be a part of a UTF-8 character; `surrogateescape` preserves its bytes.
            found.append(content[start:stop].decode("utf-8", errors="surrogateescape"))
            at = stop
        self._at = at
        return found
