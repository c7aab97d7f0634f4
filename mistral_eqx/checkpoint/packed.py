"""Reads quantized weights as they are in the file."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ..nn.kernels import native
from ..quant import FORMATS, BlockWeight, block_dims, merged_sizes, to_panels
from .placement import Index, Placement
from .reader import LazyTensor
from .source import Source


def read_blocks(source: Source, placement: Placement) -> BlockWeight | None:
    """Reads a weight in the blocks of its file; `None` if the file has it as floats, or in blocks that fit no layer.

    **Arguments:**

    - `source`: the layer.
    - `placement`: the devices.
    """
    spec, config, tensor = source.spec, source.config, source.tensor
    as_bytes = getattr(tensor, "as_bytes", None)
    format = FORMATS.get(tensor.stored)
    if as_bytes is None or format is None or not spec.in_dims:
        return None
    in_shape, out_shape = (
        tuple(getattr(config, dim) for dim in dims.split()) for dims in (spec.in_dims, spec.out_dims)
    )
    merged = merged_sizes(in_shape, format.size)
    if merged is None:
        return None
    whole = in_shape[: len(in_shape) - max(len(merged), 1)]
    count = math.prod(in_shape) // math.prod(whole) // format.size
    shape = (*out_shape, *whole, count, format.nbytes)
    dims, last = block_dims(spec.in_dims, spec.out_dims, merged), len(out_shape) - 1
    if placement.mesh is not None:
        placement.strategy.check_shape(spec.path.removesuffix(".weight"), dims, shape, placement.mesh)
    rows = {len(range(*shard[last].indices(shape[last]))) for shard in placement.shards(dims, shape)}
    kernels = placement.platform == "cpu" and native.instructions() is not None
    panel = native.PANEL if kernels and all(number % native.PANEL == 0 for number in rows) else 1
    raw: LazyTensor = as_bytes()
    stored = dataclasses.replace(source, tensor=raw, stored_shape=shape)

    def in_rows(index: Index) -> Index:
        begin, end, _ = index[last].indices(shape[last] // panel)
        # A panel has its rows' bytes side by side, so that no shard has a part of that axis.
        return *index[:last], slice(begin * panel, end * panel), *index[last + 1 : -1], slice(None)

    def read(shards: Sequence[Index]) -> list[np.ndarray]:
        arrays = stored.read(np.dtype(np.uint8), [in_rows(shard) for shard in shards])
        return arrays if panel == 1 else [arranged(array) for array in arrays]

    def arranged(array: np.ndarray) -> np.ndarray:
        # One axis of rows and one of blocks, whatever others are between them.
        flat = array.reshape(*array.shape[: last + 1], -1, format.nbytes)
        *outer, rows = array.shape[: last + 1]
        return to_panels(flat, format).reshape(*outer, rows // panel, *array.shape[last + 1 : -1], -1)

    panels = (*shape[:last], shape[last] // panel, *shape[last + 1 : -1], panel * format.nbytes)
    array = placement.put(dims, panels, np.dtype(np.uint8), read)
    return BlockWeight(array, format.name, last + 1, merged, panel)
