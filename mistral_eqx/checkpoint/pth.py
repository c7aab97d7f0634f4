"""Weights pickled by torch, the format of Mistral's first releases."""

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
from .names import layer_specs
from .reader import DTYPES, LazyTensor
from .safetensors import PlainTensor
from .weight_files import same_values


_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# The pickle holds names and sizes only; the numbers are in other records.
_LONGEST_PICKLE = 64 * MiB
# The header of a record. Its last two fields are the lengths of the name and of the extra field after the header.
_RECORD = struct.Struct("<4s22xHH")


class ConcatenatedTensor(LazyTensor):
    """A tensor whose shards lie in several files, one for each device of a tensor-parallel run."""

    def __init__(self, shards: Sequence[LazyTensor], axis: int):
        first = shards[0]
        shape = list(first.shape)
        shape[axis] = sum(shard.shape[axis] for shard in shards)
        super().__init__(first.name, tuple(shape), first.dtype, first.stored, sum(shard.nbytes for shard in shards))
        self._shards = shards
        self._axis = axis

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        blocks, begin = [], 0
        for shard in self._shards:
            end = begin + shard.shape[self._axis]
            if self._axis == 1:
                inside = None if columns is None else columns[(begin <= columns) & (columns < end)] - begin
                if inside is None or len(inside):
                    blocks.append(shard.rows(start, stop, inside))
            else:
                low, high = max(start, begin), min(stop, end)
                if low < high:
                    blocks.append(shard.rows(low - begin, high - begin, columns))
            begin = end
        if not blocks:
            width = self.shape[1:] if columns is None else (len(columns),)
            return np.empty((stop - start, *width), self.dtype)
        return np.concatenate(blocks, axis=self._axis)


def read_pickles(files: Sequence[Path], config: MistralConfig) -> dict[str, LazyTensor]:
    """Reads the headers of files that torch has pickled. Only tensors are unpickled.

    **Arguments:**

    - `files`: the files, in order. Several files either hold different tensors, or the shards of a tensor-parallel
        run. Shards of a matrix are concatenated along the axis in which they are smaller than the config's shape.
    - `config`: gives the shapes.

    **Returns:** all tensors by name.

    **Raises:** `InputError` if torch is not installed, a file cannot be read, or shards do not fit together.
    """
    found: dict[str, list[LazyTensor]] = {}
    for file in files:
        for name, tensor in read_pickle(file).items():
            found.setdefault(name, []).append(tensor)
    specs = ((spec.names(config, "mistral"), spec.file_shape(config)) for spec in layer_specs(config))
    known = itertools.takewhile(lambda entry: all(name in found for name in entry[0]), specs)
    shapes = {name: (rows // len(names), *inner) for names, (rows, *inner) in known for name in names}
    return {name: _joined(shards, shapes.get(name), files) for name, shards in found.items()}


def read_pickle(file: Path) -> dict[str, LazyTensor]:
    """Reads the header of one file; see `read_pickles`."""
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
        # torch raises exceptions of any class for a damaged pickle.
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
                f"The tensor {shown(name)} of {str(file)!r} is not a dense contiguous tensor; save it again "
                "from torch, after contiguous().",
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
    """The offset and the size of each storage in a file of torch, which is a zip archive; in ascending order."""
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
                _, _, name = record.filename.partition("/")
                if name == "data.pkl" and record.file_size > _LONGEST_PICKLE:
                    raise _unreadable(file, f"the record {shown(record.filename)} is larger than any model's")
                if name.startswith("data/") and record.file_size:
                    found.append((start, record.file_size))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise _unreadable(file, str(error)) from error
    return sorted(found)


def _starts(file: Path, records: Sequence[tuple[int, int]], storages: Sequence[Any]) -> dict[int, int]:
    """The offset of each storage in the file, by its address in torch's mapping of the file.

    torch does not check the size of a storage in the pickle against its record. So this function checks that the
    storages have the same sizes and distances in the mapping as the records have in the file.
    """
    mapped = sorted({(storage.data_ptr(), storage.nbytes()) for storage in storages})
    sizes = [size for _, size in records]
    distances = [start - records[0][0] for start, _ in records]
    if sizes != [size for _, size in mapped] or distances != [address - mapped[0][0] for address, _ in mapped]:
        raise InputError(
            f"{str(file)!r} is damaged: its records differ from its tensors in size or position; fetch it again.",
            file=file,
        )
    return {address: start for (address, _), (start, _) in zip(mapped, records, strict=True)}


def _unreadable(file: Path, reason: str) -> InputError:
    return InputError(
        f"{str(file)!r} cannot be read as weights of torch ({reason.splitlines()[0]}); fetch it again.", file=file
    )


def _joined(shards: list[LazyTensor], shape: tuple[int, ...] | None, files: Sequence[Path]) -> LazyTensor:
    first = shards[0]
    if len(shards) == 1:
        return first
    if first.shape == shape:
        # Each file of a tensor-parallel run holds a copy of every vector.
        if all(same_values(first, shard) for shard in shards[1:]):
            return first
        raise InputError(
            f"The tensor {shown(first.name)} is whole in {files[0].name!r} and in a file after it, and they differ; "
            f"the files of {str(files[0].parent)!r} belong to different models: fetch them again.",
            file=files[0],
            key=first.name,
        )
    ranks = {len(shard.shape) for shard in shards}
    if shape is not None and ranks == {len(shape)}:
        for axis in range(min(len(shape), 2)):
            whole = list(first.shape)
            whole[axis] = sum(shard.shape[axis] for shard in shards)
            if tuple(whole) == shape and all(_others(shard, axis) == _others(first, axis) for shard in shards):
                return ConcatenatedTensor(shards, axis)
    raise InputError(
        f"The shards of the tensor {shown(first.name)} in {files[0].name!r} and the files after it have the shapes "
        f"{[shard.shape for shard in shards]}, which do not make up {shape}; use the release's safetensors.",
        file=files[0],
        key=first.name,
    )


def _others(shard: LazyTensor, axis: int) -> tuple[int, ...]:
    return shard.shape[:axis] + shard.shape[axis + 1 :]
