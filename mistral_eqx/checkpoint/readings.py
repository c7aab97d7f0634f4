"""Files of one folder that each claim to be its weights."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from .names import EMBEDDING, HEAD, TensorSpec, is_derived, tensor_specs
from .reader import LazyTensor
from .source import file_order


# A tensor with so few entries is compared whole, of a larger one so many rows: what was trained differs in any of them.
_COMPARED_WHOLE = 2**14
_ROWS_COMPARED = 5


@dataclasses.dataclass(frozen=True)
class Reading:
    """One way to read the weights of a folder.

    **Attributes:**

    - `file`: the name of its file, or of the first of them.
    - `format`: whose names its tensors have.
    - `read`: finds the tensors by their names.
    """

    file: str
    format: str
    read: Callable[[MistralConfig], Mapping[str, LazyTensor]]


def the_one(folder: Path, config: MistralConfig, readings: Sequence[Reading]) -> Mapping[str, LazyTensor]:
    """The weights of a folder, which may hold them several times if they are the same.

    Two copies of a tensor count as the same if their shapes and values are; of one with more than 16384 entries, five
    rows are compared. A copy need not be complete.

    **Arguments:**

    - `folder`, `config`: of the model.
    - `readings`: all ways to read its weights, the preferred one first.

    **Returns:** the tensors of the first reading.

    **Raises:** `InputError` that names two files and a tensor in which they differ.
    """
    first, *others = readings
    tensors = first.read(config)
    for other in others:
        try:
            differing = _differing(config, first.format, tensors, other.format, other.read(config))
        except (InputError, OSError) as error:
            why = f"which cannot be compared ({str(error).rstrip('.')})"
        else:
            if differing is None:
                continue
            why = f"which differ in the tensor {shown(differing)}"
        raise InputError(
            f"The folder {str(folder)!r} holds weights in {first.file!r} and in {other.file!r}, {why}; keep one "
            "of the two "
            "and move the files of the other out of the folder.",
            file=folder / other.file,
        )
    return tensors


def _differing(
    config: MistralConfig,
    format: str,
    tensors: Mapping[str, LazyTensor],
    other_format: str,
    copies: Mapping[str, LazyTensor],
) -> str | None:
    """The name of a tensor among the copies that is not one of the tensors, if there is any."""
    found = itertools.takewhile(lambda spec: spec.name(format) in tensors, tensor_specs(config))
    known = {spec.name(other_format): spec for spec in found}
    if config.tied:
        known[HEAD.name(other_format)] = EMBEDDING
    for name, copy in copies.items():
        if is_derived(name, other_format):
            continue
        spec = known.get(name)
        if spec is None or not _same(config, spec, tensors[spec.name(format)], format, copy, other_format):
            return name
    return None


def _same(
    config: MistralConfig, spec: TensorSpec, one: LazyTensor, format: str, other: LazyTensor, other_format: str
) -> bool:
    shape = spec.file_shape(config)
    if one.shape != shape or other.shape != shape:
        return False
    return same_values(one, other, file_order(spec, config, format), file_order(spec, config, other_format))


def same_values(
    one: LazyTensor, other: LazyTensor, order: np.ndarray | None = None, other_order: np.ndarray | None = None
) -> bool:
    """Whether two tensors have the same shape and values, as far as a few of their rows tell.

    **Arguments:**

    - `one`, `other`: the tensors; what they are stored as may differ.
    - `order`, `other_order`: which row of each comes first, second and so on; as they stand unless given.
    """
    if one.shape != other.shape:
        return False
    picked = np.arange(one.shape[0] if one.shape else 0)
    if math.prod(one.shape) > _COMPARED_WHOLE:
        picked = np.unique(np.linspace(0, len(picked) - 1, _ROWS_COMPARED).astype(int))

    def values(tensor: LazyTensor, order: np.ndarray | None) -> np.ndarray:
        wanted = picked if order is None else order[picked]
        if len(wanted) == tensor.shape[0]:
            found = tensor.rows(0, tensor.shape[0])[wanted]
        else:
            found = np.concatenate([tensor.rows(row, row + 1) for row in wanted.tolist()])
        with np.errstate(all="ignore"):
            return found.astype(np.float32)

    return np.array_equal(values(one, order), values(other, other_order), equal_nan=True)
