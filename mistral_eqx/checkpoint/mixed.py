"""Checkpoints whose matrices differ in type."""

from collections.abc import Mapping

import numpy as np

from .reader import DTYPES, LazyTensor, Packed
from .safetensors import PlainTensor


def keep_types(tensors: Mapping[str, LazyTensor]) -> np.dtype:
    """Chooses the dtype of a model whose matrices keep the types of the file.

    If the matrices have one dtype, it is this one. Otherwise it is float32, and matrices of 16-bit floats are marked to
    be kept in blocks of one number, as quantized ones are.

    **Arguments:**

    - `tensors`: the tensors by their names; those of 16-bit floats get `LazyTensor.packed`.
    """
    float32 = DTYPES["float32"]
    matrices = [tensor for tensor in tensors.values() if len(tensor.shape) == 2]
    dtypes = {tensor.dtype for tensor in matrices}
    if len(dtypes) == 1:
        return dtypes.pop()
    for tensor in matrices:
        if isinstance(tensor, PlainTensor) and tensor.dtype != float32:
            tensor.packed = Packed(tensor.stored, tensor.in_bytes())
    return float32
