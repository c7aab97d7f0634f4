"""Reads quantized weights as they are in the file."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from ..nn import AbstractWeight
from ..nn.kernels import native
from ..parallel import whole
from ..quant import (
    BlockFormat,
    BlockWeight,
    OrderedWeight,
    ScaledWeight,
    block_dims,
    block_format,
    merged_sizes,
    to_panels,
)
from .placement import Index, Placement
from .reader import LazyTensor, aligned
from .source import Source


Bounds = Sequence[tuple[int, int]]

# Bytes that a core reads and arranges at a time, so few that they stay in its cache.
_PIECE = 2**20


def read_packed(source: Source, placement: Placement) -> AbstractWeight | None:
    """Reads a weight in the blocks of its file; `None` if the file has it as floats, or in blocks that fit no layer.

    **Arguments:**

    - `source`: the layer.
    - `placement`: the devices.
    """
    spec, packed = source.spec, source.tensor.packed
    if packed is None or not spec.in_dims:
        return None
    if packed.smaller is not None and placement.strategy.parts(spec.in_dims, placement.mesh) > 1:
        return read_packed(dataclasses.replace(source, tensor=packed.smaller), placement)
    in_shape, out_shape = (spec.sizes(source.config, dims) for dims in (spec.in_dims, spec.out_dims))
    merged = merged_sizes(in_shape, block_format(packed.format).size)
    if merged is None:
        return None
    if packed.order is not None and len(in_shape) > 1:
        # Sorted by groups, inputs have none of their dimensions left.
        merged = in_shape
    path = spec.path.removesuffix(".weight")

    def small(array: np.ndarray, dims: str) -> jax.Array:
        if placement.mesh is not None:
            placement.strategy.check_shape(path, dims, array.shape, placement.mesh)
        return placement.put(
            dims, array.shape, array.dtype, lambda shards: [np.asarray(array[shard]) for shard in shards]
        )

    if packed.order is not None:
        orders = [order.astype(np.int32) for order in (packed.order, np.argsort(packed.order))]
        order, inverse = (small(each, whole(spec.in_dims)) for each in orders)
        return OrderedWeight(_read_blocks(source, placement, merged), order, inverse)
    base = _read_blocks(source, placement, merged)
    if isinstance(packed.scale, LazyTensor):
        rows = dataclasses.replace(source, tensor=packed.scale, stored_shape=out_shape)
        scale = placement.put(
            spec.out_dims, out_shape, np.dtype(np.float32), functools.partial(rows.read, np.dtype(np.float32))
        )
        return ScaledWeight(base, scale, "row")
    if packed.scale is not None:
        return ScaledWeight(base, small(np.asarray(packed.scale, np.float32), ""), "tensor")
    return base


def _read_blocks(source: Source, placement: Placement, merged: tuple[int, ...]) -> BlockWeight:
    spec, config, packed = source.spec, source.config, source.tensor.packed
    assert packed is not None
    format = block_format(packed.format)
    in_shape, out_shape = (spec.sizes(config, dims) for dims in (spec.in_dims, spec.out_dims))
    outer = in_shape[: len(in_shape) - max(len(merged), 1)]
    count = math.prod(in_shape) // math.prod(outer) // format.size
    shape = (*out_shape, *outer, count, format.nbytes)
    dims, last = block_dims(spec.in_dims, spec.out_dims, merged), len(out_shape) - 1
    if placement.mesh is not None:
        placement.strategy.check_shape(spec.path.removesuffix(".weight"), dims, shape, placement.mesh)
    rows = {len(range(*shard[last].indices(shape[last]))) for shard in placement.shards(dims, shape)}
    kernels = placement.platform == "cpu" and native.supports(format.name)
    panel = native.PANEL if kernels and all(number % native.PANEL == 0 for number in rows) else 1
    stored = dataclasses.replace(source, tensor=packed.blocks, stored_shape=shape)

    panels = (*shape[:last], shape[last] // panel, *shape[last + 1 : -1], panel * format.nbytes)

    def read(shards: Sequence[Index]) -> list[np.ndarray]:
        if panel == 1:
            return stored.read(np.dtype(np.uint8), [(*shard[:-1], slice(None)) for shard in shards])
        bounds = [[axis.indices(size)[:2] for axis, size in zip(shard, panels, strict=True)] for shard in shards]
        return _read_panels(stored, format, last, bounds)

    array = placement.put(dims, panels, np.dtype(np.uint8), read)
    return BlockWeight(array, format.name, last + 1, merged, panel)


def _read_panels(stored: Source, format: BlockFormat, last: int, shards: Sequence[Bounds]) -> list[np.ndarray]:
    """Reads blocks and arranges them in panels; each core reads a piece and arranges it while it is in its cache.

    **Arguments:**

    - `stored`: the blocks in the file.
    - `format`: their format.
    - `last`: the axis that counts panels.
    - `shards`: where each shard begins and ends on each axis of all panels. None splits the last axis, which has the
        bytes of a panel's rows side by side.

    **Returns:** an array for each shard, aligned so that the CPU backend can use it without a copy.
    """
    arrays = [aligned(tuple(end - begin for begin, end in shard), np.dtype(np.uint8)) for shard in shards]
    same: dict[tuple[int, int], list[int]] = {}
    for number, shard in enumerate(shards):
        same.setdefault(shard[0], []).append(number)

    def arrange(numbers: list[int], begin: int, end: int):
        positions = [[(begin, end), *shards[number][1:-1]] for number in numbers]
        for position in positions:
            position[last] = (position[last][0] * native.PANEL, position[last][1] * native.PANEL)
        indices = [(*(slice(*bounds) for bounds in position), slice(None)) for position in positions]
        for number, blocks in zip(numbers, stored.read(np.dtype(np.uint8), indices), strict=True):
            first = shards[number][0][0]
            to_panels(blocks, format, last, into=arrays[number][begin - first : end - first])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pieces = []
        for (first, stop), numbers in same.items():
            step = max(1, _PIECE // sum(arrays[number][0].nbytes for number in numbers))
            pieces += [pool.submit(arrange, numbers, at, min(at + step, stop)) for at in range(first, stop, step)]
        for piece in pieces:
            piece.result()
    return arrays
