"""Reads quantized weights as they are in the file."""

import dataclasses
import math

import numpy as np

from ..quant import FORMATS, BlockWeight, block_dims, merged_sizes
from .placement import Placement
from .reader import LazyTensor
from .source import Source


def read_blocks(source: Source, placement: Placement) -> BlockWeight | None:
    """Reads a weight in the blocks of its file; `None` if the file has it in another form.

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
    blocks = math.prod(in_shape) // math.prod(whole) // format.size
    shape = (*out_shape, *whole, blocks, format.nbytes)
    raw: LazyTensor = as_bytes()
    stored = dataclasses.replace(source, tensor=raw, stored_shape=shape)
    dims = block_dims(spec.in_dims, spec.out_dims, merged)
    array = placement.put(dims, shape, np.dtype(np.uint8), lambda shards: stored.read(np.dtype(np.uint8), shards))
    return BlockWeight(array, format.name, merged)
