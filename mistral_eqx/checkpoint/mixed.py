"""Checkpoints that have matrices of 16-bit floats beside others."""

from collections.abc import Mapping

from .reader import DTYPES, LazyTensor, Packed
from .safetensors import PlainTensor


def keep_16_bits(tensors: Mapping[str, LazyTensor]):
    """Marks matrices of 16-bit floats to be kept in a model of float32, in blocks of one number.

    **Arguments:**

    - `tensors`: the tensors by their names; those of 16-bit floats get `LazyTensor.packed`.
    """
    for tensor in tensors.values():
        if isinstance(tensor, PlainTensor) and len(tensor.shape) >= 2 and tensor.dtype != DTYPES["float32"]:
            tensor.packed = Packed(tensor.stored, tensor.in_bytes())
