"""Weights that torch has pickled, as Mistral released its first models."""

import itertools
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MistralConfig
from ..documents import MiB, expect_regular, shown
from ..errors import InputError
from .names import tensor_specs
from .reader import DTYPES, LazyTensor
from .readings import same_values
from .safetensors import PlainTensor


_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# The pickle itself holds names and sizes only.
_LONGEST_PICKLE = 64 * MiB
# A record's own header, before its name: the lengths of the name and of what follows it stand at its end.
_RECORD = struct.Struct("<4s22xHH")


class ConcatenatedTensor(LazyTensor):
    """A tensor whose parts lie in several files, one for each device of the machine that trained it."""

    def __init__(self, parts: Sequence[LazyTensor], axis: int):
        first = parts[0]
        shape = list(first.shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        super().__init__(first.name, tuple(shape), first.dtype, first.stored, sum(part.nbytes for part in parts))
        self._parts = parts
        self._axis = axis

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        blocks, begin = [], 0
        for part in self._parts:
            end = begin + part.shape[self._axis]
            if self._axis == 1:
                inside = None if columns is None else columns[(begin <= columns) & (columns < end)] - begin
                if inside is None or len(inside):
                    blocks.append(part.rows(start, stop, inside))
            else:
                low, high = max(start, begin), min(stop, end)
                if low < high:
                    blocks.append(part.rows(low - begin, high - begin, columns))
            begin = end
        if not blocks:
            width = self.shape[1:] if columns is None else (len(columns),)
            return np.empty((stop - start, *width), self.dtype)
        return np.concatenate(blocks, axis=self._axis)


def read_pickles(files: Sequence[Path], config: MistralConfig) -> dict[str, LazyTensor]:
    """Reads which tensors one or several files of torch hold. Nothing but tensors is unpickled.

    **Arguments:**

    - `files`: in order. Several are either parts with tensors of their own, or one for each device of a
        tensor-parallel run: then each matrix is put together along the axis in which its parts fall short of the
        config's shape.
    - `config`: tells the shapes.

    **Returns:** all tensors by name.

    **Raises:** `InputError` if torch is not installed, a file cannot be read, or parts do not fit together.
    """
    found: dict[str, list[LazyTensor]] = {}
    for file in files:
        for name, tensor in read_pickle(file).items():
            found.setdefault(name, []).append(tensor)
    known = itertools.takewhile(lambda spec: spec.mistral in found, tensor_specs(config))
    shapes = {spec.mistral: spec.file_shape(config) for spec in known}
    return {name: _joined(parts, shapes.get(name), files) for name, parts in found.items()}


def read_pickle(file: Path) -> dict[str, LazyTensor]:
    """The tensors of one file, by name, as `read_pickles` reads them."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"{str(file)!r} was pickled by torch, which is not installed; run pip install 'mistral-eqx[torch]', "
            "or use the release's safetensors.",
            file=file,
        ) from error
    expect_regular(file)
    records = _records(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # What a damaged pickle makes torch raise is of any kind.
        raise _unreadable(file, str(error).strip() or type(error).__name__) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise InputError(f"{str(file)!r} does not hold a mapping from names to tensors; fetch it again.", file=file)
    for name, value in content.items():
        if str(value.dtype).removeprefix("torch.") not in DTYPES:
            raise InputError(
                f"The tensor {shown(name)} of {str(file)!r} has the dtype {value.dtype}, which is not supported; "
                f"the supported ones are {', '.join(DTYPES)}: use an unquantised checkpoint.",
                file=file,
                key=name,
            )
        plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_neg()
        if not plain or not value.is_contiguous():
            raise InputError(
                f"The tensor {shown(name)} of {str(file)!r} does not lie in one piece as rows of numbers; save it "
                "again from torch, after contiguous().",
                file=file,
                key=name,
            )
    starts = _starts(file, records, [value.untyped_storage() for value in content.values() if value.numel()])
    tensors: dict[str, LazyTensor] = {}
    for name, value in content.items():
        dtype = DTYPES[str(value.dtype).removeprefix("torch.")]
        within = value.storage_offset() * dtype.itemsize
        offset = starts[value.untyped_storage().data_ptr()] + within if value.numel() else 0
        tensors[name] = PlainTensor(name, tuple(value.shape), dtype, _STORED[dtype.name], file, offset)
    return tensors


def _records(file: Path) -> list[tuple[int, int]]:
    """Where the data of each storage begins in a file of torch, which is a zip archive, and its bytes; in order."""
    found: list[tuple[int, int]] = []
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as content:
            size = os.fstat(content.fileno()).st_size
            for record in archive.infolist():
                content.seek(record.header_offset)
                magic, name_length, extra_length = _RECORD.unpack(content.read(_RECORD.size))
                start = record.header_offset + _RECORD.size + name_length + extra_length
                if magic != b"PK\3\4" or start + record.compress_size > size:
                    raise _unreadable(file, f"the record {shown(record.filename)} lies outside of the file")
                if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                    raise _unreadable(file, f"the record {shown(record.filename)} is compressed")
                _, _, place = record.filename.partition("/")
                if place == "data.pkl" and record.file_size > _LONGEST_PICKLE:
                    raise _unreadable(file, f"the record {shown(record.filename)} is larger than any model's")
                if place.startswith("data/") and record.file_size:
                    found.append((start, record.file_size))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise _unreadable(file, str(error)) from error
    return sorted(found)


def _starts(file: Path, records: Sequence[tuple[int, int]], storages: Sequence[Any]) -> dict[int, int]:
    """Where each storage begins in the file, by its address in torch's mapping of the file.

    The pickle says how long a storage is, and torch believes it, even beyond its record. So the storages must lie in
    the mapping just as the records lie in the file.
    """
    mapped = sorted({(storage.data_ptr(), storage.nbytes()) for storage in storages})
    sizes = [size for _, size in records]
    distances = [start - records[0][0] for start, _ in records]
    if sizes != [size for _, size in mapped] or distances != [address - mapped[0][0] for address, _ in mapped]:
        raise InputError(
            f"{str(file)!r} is damaged: its records are not as long as its tensors, or lie elsewhere; fetch it again.",
            file=file,
        )
    return {address: start for (address, _), (start, _) in zip(mapped, records, strict=True)}


def _unreadable(file: Path, reason: str) -> InputError:
    return InputError(
        f"{str(file)!r} cannot be read as weights of torch ({reason.splitlines()[0]}); fetch it again.", file=file
    )


def _joined(parts: list[LazyTensor], shape: tuple[int, ...] | None, files: Sequence[Path]) -> LazyTensor:
    first = parts[0]
    if len(parts) == 1:
        return first
    if first.shape == shape:
        # A vector is whole in each file of a tensor-parallel run.
        if all(same_values(first, part) for part in parts[1:]):
            return first
        raise InputError(
            f"The tensor {shown(first.name)} is whole in {files[0].name!r} and in a file after it, and they differ; "
            f"the files of {str(files[0].parent)!r} belong to different models: fetch them again.",
            file=files[0],
            key=first.name,
        )
    ranks = {len(part.shape) for part in parts}
    if shape is not None and ranks == {len(shape)}:
        for axis in range(min(len(shape), 2)):
            whole = list(first.shape)
            whole[axis] = sum(part.shape[axis] for part in parts)
            if tuple(whole) == shape and all(_others(part, axis) == _others(first, axis) for part in parts):
                return ConcatenatedTensor(parts, axis)
    raise InputError(
        f"The parts of the tensor {shown(first.name)} in {files[0].name!r} and the files after it have the shapes "
        f"{[part.shape for part in parts]}, which do not make up {shape}; use the release's safetensors.",
        file=files[0],
        key=first.name,
    )


def _others(part: LazyTensor, axis: int) -> tuple[int, ...]:
    return part.shape[:axis] + part.shape[axis + 1 :]
