"""A folder that may hold its weights several times, in several formats."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from .experts import join_experts
from .names import EMBEDDING, HEAD, LayerSpec, is_derived, layer_specs
from .reader import LazyTensor
from .source import file_order


# A larger tensor is compared by a few rows only: weights that were trained differ in every row.
_LARGEST_COMPARED_WHOLE = 2**14
_ROWS_COMPARED = 5


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The files that hold the weights of a folder in one format.

    **Attributes:**

    - `file`: the name of the file, or of the first file.
    - `format`: the format of the tensors' names.
    - `read`: reads the headers, and returns the tensors by name.
    """

    file: str
    format: str
    read: Callable[[MistralConfig], Mapping[str, LazyTensor]]


def read_consistent(
    folder: Path, config: MistralConfig, weight_files: Sequence[WeightFiles]
) -> Mapping[str, LazyTensor]:
    """Reads the weights of a folder, and checks that all copies of them are the same.

    Two copies of a tensor are the same if their shapes and values are equal. For a tensor with more than 16384
    entries, the check compares five rows. A copy may lack tensors.

    **Arguments:**

    - `folder`, `config`: the folder and the config of the model.
    - `weight_files`: all copies of the weights, the preferred one first.

    **Returns:** the tensors of the first copy.

    **Raises:** `InputError` that names two files, and a tensor that differs between them.
    """
    first, *others = weight_files
    tensors = join_experts(first.read(config), config, first.format, folder)
    for other in others:
        try:
            copies = join_experts(other.read(config), config, other.format, folder)
            differing = _differing(config, first.format, tensors, other.format, copies)
        except (InputError, OSError) as error:
            problem = f"which cannot be compared ({str(error).rstrip('.')})"
        else:
            if differing is None:
                continue
            problem = f"which differ in the tensor {shown(differing)}"
        raise InputError(
            f"The folder {str(folder)!r} holds weights in {first.file!r} and in {other.file!r}, {problem}; keep one "
            "of the two and move the files of the other out of the folder.",
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
    """The name of the first copy that differs from its tensor, or that the model lacks; `None` if there is none."""
    found = itertools.takewhile(lambda spec: spec.name(format) in tensors, layer_specs(config))
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
    config: MistralConfig, spec: LayerSpec, one: LazyTensor, format: str, other: LazyTensor, other_format: str
) -> bool:
    shape = spec.file_shape(config)
    if one.shape != shape or other.shape != shape:
        return False
    return same_values(one, other, file_order(spec, config, format), file_order(spec, config, other_format))


def same_values(
    one: LazyTensor, other: LazyTensor, order: np.ndarray | None = None, other_order: np.ndarray | None = None
) -> bool:
    """Whether two tensors have the same shape and values. Of large tensors, a few rows are compared.

    **Arguments:**

    - `one`, `other`: the tensors; their stored types may differ.
    - `order`, `other_order`: for each tensor, the order in which its rows are compared; the file's order unless given.
    """
    if one.shape != other.shape:
        return False
    picked = np.arange(one.shape[0] if one.shape else 0)
    if math.prod(one.shape) > _LARGEST_COMPARED_WHOLE:
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
