"""Weights that torch has pickled, as Mistral released its first models."""

import ctypes
import math
import mmap
import pickle
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MistralConfig
from ..errors import InputError
from .names import rows
from .reader import DTYPES, LazyTensor


_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class TorchTensor(LazyTensor):
    """A tensor in a file that torch has mapped.

    The system reads a mapped file by pages: columns that lie closer together than a page bring their neighbours along.
    """

    def __init__(self, name: str, tensor: Any, dtype: np.dtype):
        super().__init__(name, tuple(tensor.shape), dtype, _STORED[dtype.name], tensor.numel() * dtype.itemsize)
        self._tensor = tensor

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        import torch  # pyright: ignore[reportMissingImports]

        part = self._tensor[start:stop]
        wanted = part if columns is None else part[:, torch.from_numpy(columns)]
        # numpy has no bfloat16 of its own, so the bits travel as integers.
        bits = {2: torch.int16, 4: torch.int32}[self.dtype.itemsize]
        result = wanted.contiguous().view(bits).numpy().view(self.dtype).copy()
        _drop_pages(part.data_ptr(), part.numel() * self.dtype.itemsize)
        return result


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

    **Raises:** `ValueError` if torch is not installed, a file cannot be read, or parts do not fit together.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"{str(files[0])!r} was pickled by torch, which is not installed; run pip install 'mistral-eqx[torch]', "
            "or use the release's safetensors."
        ) from error
    found: dict[str, list[TorchTensor]] = {}
    for file in files:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{str(file)!r} cannot be read as weights of torch ({reason}); fetch it again.") from error
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise InputError(f"{str(file)!r} does not hold a mapping from names to tensors; fetch it again.")
        for name, value in content.items():
            dtype = DTYPES.get(str(value.dtype).removeprefix("torch."))
            if dtype is None:
                raise InputError(
                    f"The tensor {name!r} of {str(file)!r} has the dtype {value.dtype}, which is not supported; "
                    f"the supported ones are {', '.join(DTYPES)}: use an unquantised checkpoint."
                )
            found.setdefault(name, []).append(TorchTensor(name, value, dtype))
    shapes = {row.mistral: row.file_shape(config) for row in rows(config)}
    return {name: _joined(parts, shapes.get(name), files) for name, parts in found.items()}


def _joined(parts: list[TorchTensor], shape: tuple[int, ...] | None, files: Sequence[Path]) -> LazyTensor:
    if len(parts) == 1 or parts[0].shape == shape:
        # A vector is whole in each file of a tensor-parallel run.
        return parts[0]
    ranks = {len(part.shape) for part in parts}
    if shape is not None and ranks == {len(shape)}:
        for axis in range(min(len(shape), 2)):
            whole = list(parts[0].shape)
            whole[axis] = sum(part.shape[axis] for part in parts)
            if tuple(whole) == shape and all(_others(part, axis) == _others(parts[0], axis) for part in parts):
                return ConcatenatedTensor(parts, axis)
    raise InputError(
        f"The parts of the tensor {parts[0].name!r} in {files[0].name!r} and the files after it have the shapes "
        f"{[part.shape for part in parts]}, which do not make up {shape}; use the release's safetensors."
    )


def _others(part: LazyTensor, axis: int) -> tuple[int, ...]:
    return part.shape[:axis] + part.shape[axis + 1 :]


def _drop_pages(address: int, size: int):
    """Gives back the pages of the mapping that hold these bytes: they would count as resident memory."""
    if sys.platform != "linux" or not size:
        return
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    stop = math.ceil((address + size) / mmap.PAGESIZE) * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
