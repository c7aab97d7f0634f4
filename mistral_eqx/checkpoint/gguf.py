"""GGUF, the format of llama.cpp: keys and values, then tensors, most of them quantised by blocks."""

import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..config import MistralConfig
from ..errors import InputError
from .names import HEAD
from .ranges import of_columns, read_ranges
from .reader import DTYPES, Checkpoint, LazyTensor, main_dtype
from .safetensors import PlainTensor


_PLAIN = {"F32": DTYPES["float32"], "F16": DTYPES["float16"], "BF16": DTYPES["bfloat16"]}

_SCALARS = {
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.BOOL: "?",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT64: "d",
}


class QuantisedTensor(LazyTensor):
    """Blocks of a few bits an entry, turned into float32 as they are read.

    A block is read whole, even if only some of its columns are asked for.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: gguf.GGMLQuantizationType,
        row_bytes: int,
        path: Path,
        offset: int,
    ):
        super().__init__(name, shape, DTYPES["float32"], kind.name, math.prod(shape[:-1]) * row_bytes)
        self._kind = kind
        self._row_bytes = row_bytes
        self._path = path
        self._offset = offset

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        if len(self.shape) == 1:
            # A vector's rows are entries, which have no address of their own: it is read whole.
            return self._dequantised(0, 1)[0, start:stop].copy()
        if columns is not None:
            block = gguf.GGML_QUANT_SIZES[self._kind][0]
            within = np.unique(columns // block)
            values = self._dequantised(start, stop, within)
            whole = len(columns) == values.shape[1]
            return values if whole else values[:, np.searchsorted(within, columns // block) * block + columns % block]
        inner = math.prod(self.shape[1:-1])
        values = self._dequantised(start * inner, stop * inner)
        return values.reshape(stop - start, *self.shape[1:])

    def _dequantised(self, start: int, stop: int, blocks: np.ndarray | None = None) -> np.ndarray:
        count, offset = stop - start, self._offset + start * self._row_bytes
        block, block_bytes = gguf.GGML_QUANT_SIZES[self._kind]
        if blocks is None:
            raw = np.empty((count, self._row_bytes), np.uint8)
            ranges = [(offset, raw.nbytes)]
        else:
            raw = np.empty((count, len(blocks) * block_bytes), np.uint8)
            ranges = of_columns(offset, count, self._row_bytes, blocks, block_bytes)
        read_ranges(self._path, ranges, raw)
        if not raw.size:
            return np.empty((count, raw.shape[1] // block_bytes * block), np.float32)
        return gguf.quants.dequantize(raw, self._kind).astype(np.float32, copy=False)


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file.

    **Arguments:**

    - `path`: the file, of architecture `llama`.

    **Returns:** the checkpoint.

    **Raises:** `ValueError` if the file is not of that format, is truncated, or holds something that is not supported.
    """
    metadata, tensors = read_gguf(path)
    config = MistralConfig.from_gguf(metadata, tied=HEAD.gguf not in tensors, file=path)
    return Checkpoint(path, "gguf", config, main_dtype(tensors), tensors, metadata)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Reads the keys and values of a GGUF file, and which tensors it holds.

    The format's own package makes an array of each token of the vocabulary, which takes seconds; here the header is
    walked through once.

    **Arguments:**

    - `path`: the file.

    **Returns:** the values by their keys, and the tensors by their names.

    **Raises:** `ValueError` if the file is not of that format, is truncated, or has an element type that is not
    supported.
    """
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{str(path)!r} is empty; fetch it again.")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{str(path)!r} is not a GGUF file: it does not begin with the letters GGUF.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                version, metadata, infos, end = _Header(content).read()
            except (struct.error, IndexError) as error:
                raise InputError(f"{str(path)!r} is truncated within its header; fetch it again.") from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{str(path)!r} is damaged: {error}; fetch it again.") from error
    if version not in (2, 3):
        raise InputError(f"{str(path)!r} is GGUF of version {version}; supported are 2 and 3, little-endian.")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise InputError(f"{str(path)!r} is damaged: its general.alignment is {alignment!r}; fetch it again.")
    base = -(-end // alignment) * alignment
    tensors = {name: _tensor(path, size, base, name, *info) for name, info in infos.items()}
    return metadata, tensors


def _tensor(path: Path, size: int, base: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> LazyTensor:
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError:
        known = None
    if known is None or not (known.name in _PLAIN or _can_dequantise(known)):
        stored = str(kind) if known is None else known.name
        raise InputError(
            f"The tensor {name!r} of {str(path)!r} has the element type {stored}, which the gguf package cannot "
            "dequantise; use a file quantised otherwise, such as Q8_0 or Q4_K_M."
        )
    block, block_bytes = gguf.GGML_QUANT_SIZES[known]
    if not shape or shape[-1] % block:
        raise InputError(f"{str(path)!r} is damaged: the tensor {name!r} has shape {shape} in blocks of {block}.")
    row_bytes = shape[-1] // block * block_bytes
    stop = base + offset + math.prod(shape[:-1]) * row_bytes
    if stop > size:
        raise InputError(
            f"{str(path)!r} is truncated: it has {size} bytes, but the tensor {name!r} ends at {stop}; fetch it again."
        )
    if known.name in _PLAIN:
        return PlainTensor(name, shape, _PLAIN[known.name], known.name, path, base + offset)
    return QuantisedTensor(name, shape, known, row_bytes, path, base + offset)


@functools.cache
def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
    """Asks the package: it keeps no list of the types that it knows."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class _Header:
    """A cursor over the header of a GGUF file."""

    def __init__(self, content: mmap.mmap):
        self._content = content
        self._at = 4

    def read(self) -> tuple[int, dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
        """The version, the values, each tensor's shape, element type and offset, and where the header ends."""
        version = self._number("I")
        if version not in (2, 3):
            return version, {}, {}, 0
        tensors, pairs = self._number("Q"), self._number("Q")
        metadata = {}
        for _ in range(pairs):
            key = self._text()
            metadata[key] = self._value(self._number("I"))
        infos = {}
        for _ in range(tensors):
            name = self._text()
            if name in infos:
                raise InputError(f"it holds two tensors {name!r}")
            rank = self._number("I")
            if rank > 8:
                raise InputError(f"its tensor {name!r} has {rank} axes")
            axes = [self._number("Q") for _ in range(rank)]
            # The file tells the innermost axis first.
            infos[name] = tuple(reversed(axes)), self._number("I"), self._number("Q")
        return version, metadata, infos, self._at

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._content, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _text(self) -> str:
        length = self._number("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._content):
            raise IndexError
        # A vocabulary may hold tokens that are no text by themselves; their bytes survive this.
        return self._content[start : self._at].decode("utf-8", errors="surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind == gguf.GGUFValueType.STRING:
            return self._text()
        if kind == gguf.GGUFValueType.ARRAY:
            element, count = self._number("I"), self._number("Q")
            if element in _SCALARS:
                code = _SCALARS[gguf.GGUFValueType(element)]
                start, self._at = self._at, self._at + count * struct.calcsize(f"<{code}")
                if self._at > len(self._content):
                    raise IndexError
                return list(struct.unpack_from(f"<{count}{code}", self._content, start))
            return [self._value(element) for _ in range(count)]
        if kind not in _SCALARS:
            raise InputError(f"a value of its header has the unknown type {kind}")
        return self._number(_SCALARS[gguf.GGUFValueType(kind)])
