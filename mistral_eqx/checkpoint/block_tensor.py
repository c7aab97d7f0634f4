"""A quantized weight that a checkpoint stores in tensors of its own kind, in the blocks of this package."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ..quant import block_format
from .reader import DTYPES, LazyTensor, Packed


class _Bytes(LazyTensor):
    """The bytes of blocks, made when they are read."""

    def __init__(self, name: str, shape: tuple[int, int], stored: str, read: Callable[[int, int], np.ndarray]):
        super().__init__(name, shape, np.dtype(np.uint8), stored, math.prod(shape))
        self._read = read

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        found = self._read(start, stop).reshape(stop - start, -1)
        return found if columns is None else found[:, columns]


class StackedTensor(LazyTensor):
    """Matrices in blocks as a tensor with three axes."""

    def __init__(self, matrix: "BlockTensor", shape: tuple[int, ...]):
        """**Arguments:**

        - `matrix`: the rows of all matrices, one after the other.
        - `shape`: how many matrices, and the rows and columns of each.
        """
        super().__init__(matrix.name, shape, matrix.dtype, matrix.stored, matrix.nbytes)
        self.packed = matrix.packed
        self._matrix = matrix

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        rows = self.shape[1]
        return self._matrix.rows(start * rows, stop * rows, columns).reshape(stop - start, rows, -1)


class BlockTensor(LazyTensor):
    """A weight in blocks, dequantized to float32 when it is read."""

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        format: str,
        read: Callable[[int, int], np.ndarray],
        nbytes: int,
        scale: LazyTensor | float | None = None,
        order: np.ndarray | None = None,
        smaller: LazyTensor | None = None,
    ):
        """**Arguments:**

        - `name`, `shape`: of the weight, rows and columns.
        - `format`: the name of the format of its blocks.
        - `read`: the blocks of rows `start` to `stop - 1`, shape `(rows, blocks, bytes)`.
        - `nbytes`: its size in the files.
        - `scale`, `order`, `smaller`: as in `Packed`.
        """
        super().__init__(name, shape, DTYPES["float32"], format, nbytes)
        kind = block_format(format)
        count = shape[1] // kind.size * kind.nbytes
        blocks = _Bytes(name, (shape[0], count), format, read)
        self._packed = self.packed = Packed(format, blocks, scale, order, smaller)

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        packed, kind = self._packed, block_format(self._packed.format)
        raw = packed.blocks.rows(start, stop).reshape(stop - start, -1, kind.nbytes)
        # On the CPU, whatever device the model is for.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            numbers = np.array(kind.dequantize(jnp.asarray(raw))).reshape(stop - start, -1)
        if isinstance(packed.scale, LazyTensor):
            numbers *= packed.scale.rows(start, stop).astype(np.float32).reshape(-1, 1)
        elif packed.scale is not None:
            numbers *= np.float32(packed.scale)
        if packed.order is not None:
            ordered = np.empty_like(numbers)
            ordered[:, packed.order] = numbers
            numbers = ordered
        return numbers if columns is None else numbers[:, columns]
