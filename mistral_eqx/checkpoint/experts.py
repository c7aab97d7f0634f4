"""The weights of experts as matrices with the rows of all experts, however a file stores them."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from .names import LayerSpec, layer_specs
from .reader import LazyTensor, Packed, matrix_rows


Runs = Sequence[tuple[LazyTensor, int, int]]


class RowsTensor(LazyTensor):
    """Rows of one or several tensors, one tensor after the other, as a matrix.

    **Arguments:**

    - `name`: what the matrix is called.
    - `runs`: for each run of rows, the tensor, its first row and the number of rows. The rows of a tensor with three
        axes are those of its matrices, one after the other.
    """

    def __init__(self, name: str, runs: Runs):
        tensor = runs[0][0]
        shape = sum(count for *_, count in runs), *tensor.shape[1:][-1:]
        nbytes = sum(
            each.nbytes * count // math.prod(each.shape[: max(1, len(each.shape) - 1)]) for each, _, count in runs
        )
        super().__init__(name, shape, tensor.dtype, tensor.stored, nbytes)
        self._runs = runs
        self.packed = _packed(name, runs)

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        found, first = [], 0
        for tensor, offset, count in self._runs:
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                found.append(matrix_rows(tensor, offset + low, offset + high, columns).astype(self.dtype, copy=False))
            first += count
        return found[0] if len(found) == 1 else np.concatenate(found)

    def write(self, start: int, block: np.ndarray, columns: np.ndarray | None = None):
        first, stop = 0, start + len(block)
        for tensor, offset, count in self._runs:
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                tensor.write(offset + low, block[first + low - start : first + high - start], columns)
            first += count


class _Constant(LazyTensor):
    """A scale for each row of a weight that has one scale."""

    def __init__(self, name: str, rows: int, value: float):
        super().__init__(name, (rows,), np.dtype(np.float32), "F32", 0)
        self._value = value

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        return np.full(stop - start, self._value, np.float32)


def _packed(name: str, runs: Runs) -> Packed | None:
    """The blocks of all runs, if all have the same format and none has sorted inputs."""
    found = [
        (tensor.packed, first, count)
        for tensor, first, count in runs
        if tensor.packed is not None and tensor.packed.order is None
    ]
    if len(found) < len(runs) or len({packed.format for packed, *_ in found}) > 1:
        return None

    def scale_of(packed: Packed) -> LazyTensor:
        if isinstance(packed.scale, LazyTensor):
            return packed.scale
        return _Constant(name, packed.blocks.shape[0], 1.0 if packed.scale is None else packed.scale)

    blocks = RowsTensor(name, [(packed.blocks, first, count) for packed, first, count in found])
    scale = None
    if any(packed.scale is not None for packed, *_ in found):
        scale = RowsTensor(name, [(scale_of(packed), first, count) for packed, first, count in found])
    smaller = None
    if all(packed.smaller is not None for packed, *_ in found):
        smaller = RowsTensor(name, [(packed.smaller, first, count) for packed, first, count in found if packed.smaller])
    return Packed(found[0][0].format, blocks, scale, smaller=smaller)


def is_joined(spec: LayerSpec) -> bool:
    """Whether the rows of a weight may be in several tensors of a file, or in one with three axes."""
    return not {"experts", "routes"}.isdisjoint(spec.dims.split())


def join_experts(
    tensors: Mapping[str, LazyTensor], config: MistralConfig, format: str, path: Path
) -> Mapping[str, LazyTensor]:
    """The tensors of a checkpoint, with one matrix for each weight of all experts.

    Hugging Face and Mistral store a tensor for each expert, GGUF stacks them. Newer Hugging Face models also stack
    them, with the rows of `gate_proj` before those of `up_proj` in each expert; so do some GGUF files.

    **Arguments:**

    - `tensors`: the tensors by their names in the files.
    - `config`, `format`, `path`: of the checkpoint.

    **Raises:** `InputError` that names a tensor that is missing or has another shape than the config says.
    """
    if config.routing is None:
        return tensors
    joined: dict[str, LazyTensor] = {}
    # By identity: a tensor of a wrapped model has another name in its file.
    used: set[int] = set()
    for spec in layer_specs(config):
        if not is_joined(spec):
            continue
        runs = runs_of(tensors, spec, config, format, path)
        if not runs:
            break  # `sources` names the missing tensor
        used |= {id(tensor) for tensor, *_ in runs}
        joined[spec.name(format)] = RowsTensor(spec.name(format), runs)
    return {name: tensor for name, tensor in tensors.items() if id(tensor) not in used} | joined


def runs_of(
    tensors: Mapping[str, LazyTensor], spec: LayerSpec, config: MistralConfig, format: str, path: Path
) -> list[tuple[LazyTensor, int, int]]:
    """Where the rows of a weight of experts are, for `RowsTensor`; empty if its tensors are missing."""
    experts = config.experts
    total, inner = spec.file_shape(config)
    rows = total // experts

    def expected(name: str, *shape: int) -> LazyTensor:
        return expect_shape(tensors, name, shape, path)

    block = re.split(r"\.(?:block_sparse_moe|mlp)\.", spec.hf)[0]
    weight = spec.path.rpartition(".")[2]
    router, down, both = (f"{block}.mlp.{end}" for end in ("gate.weight", "experts.down_proj", "experts.gate_up_proj"))
    if format == "gguf":
        both = f"{spec.gguf.rpartition('.')[0]}.ffn_gate_up_exps.weight"
    if format == "hf" and weight == "router" and router in tensors:
        return [(expected(router, total, inner), 0, total)]
    if format == "hf" and weight == "down_proj" and down in tensors:
        return [(expected(down, experts, rows, inner), 0, total)]
    if weight in ("gate_proj", "up_proj") and both in tensors:
        tensor, first = expected(both, experts, 2 * rows, inner), rows * (weight == "up_proj")
        return [(tensor, 2 * rows * expert + first, rows) for expert in range(experts)]
    names = spec.names(config, format)
    missing = [name for name in names if name not in tensors]
    if len(missing) == len(names):
        return []
    if missing:
        raise InputError(
            f"{str(path)!r} has no tensor {missing[0]!r}, but has those of other experts; fetch the checkpoint again, "
            "or correct the number of experts in its config.",
            file=path,
            key=missing[0],
        )
    if len(names) > 1:
        return [(expected(name, rows, inner), 0, rows) for name in names]
    shape = (total, inner) if weight == "router" else (experts, rows, inner)
    return [(expected(names[0], *shape), 0, total)]


def expect_shape(tensors: Mapping[str, LazyTensor], name: str, shape: tuple[int, ...], path: Path) -> LazyTensor:
    """A tensor of a checkpoint; an `InputError` names it if it has another shape."""
    if tensors[name].shape != shape:
        raise InputError(
            f"The tensor {name!r} of {str(path)!r} has shape {shown(tensors[name].shape)}, but its config requires "
            f"{shape}; the weights and the config belong to different models: fetch both again together.",
            file=path,
            key=name,
        )
    return tensors[name]
