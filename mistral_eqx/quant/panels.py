"""Panels: the blocks of several rows side by side, in the order in which the kernels read them.

Of each field of a block a panel has first the leading 4 bytes of all rows, then the next 4, and so on, so that a vector
register has the same codes of all rows. Fields of 1 or 2 bytes keep these together.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from ..nn.kernels import native
from .layout import BlockFormat


def to_panels(
    blocks: UInt8[np.ndarray, "... bytes"],
    format: BlockFormat,
    rows_axis: int = -3,
    into: UInt8[np.ndarray, "... _"] | None = None,
) -> UInt8[np.ndarray, "... _"]:
    """Arranges blocks in panels.

    **Arguments:**

    - `blocks`: the blocks of rows, shape `(..., rows, ..., bytes)`; the number of rows is a multiple of `native.PANEL`.
    - `format`: their format.
    - `rows_axis`: the axis of the rows; all between it and the last are of blocks.
    - `into`: where to put the panels, contiguous; a new array by default.

    **Returns:** shape `(..., rows / PANEL, ..., PANEL * bytes)`.
    """
    (*outer, rows), inner = blocks.shape[: rows_axis % blocks.ndim + 1], blocks.shape[rows_axis % blocks.ndim + 1 : -1]
    nbytes, count = blocks.shape[-1], math.prod(inner)
    rows_of_panels = np.ascontiguousarray(blocks).reshape(-1, native.PANEL, count, nbytes)
    if into is None:
        into = np.empty((*outer, rows // native.PANEL, *inner, native.PANEL * nbytes), np.uint8)
    panels = into.reshape(len(rows_of_panels), count, native.PANEL * nbytes)
    if native.arrange(rows_of_panels, format.fields, panels):
        return into
    at = 0
    for size in format.fields:
        unit = min(size, 4)
        field = _units(rows_of_panels, at, (size // unit,), unit)
        side_by_side = _units(panels, native.PANEL * at, (size // unit, native.PANEL), unit)
        side_by_side[...] = np.moveaxis(field, 1, -1)
        at += size
    return into


def _units(x: np.ndarray, at: int, shape: tuple[int, ...], nbytes: int) -> np.ndarray:
    """Numbers of `nbytes` bytes, from byte `at` of the last axis on, as an array of the given shape in its place."""
    inner = [nbytes * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return np.ndarray((*x.shape[:-1], *shape), f"u{nbytes}", x, at, (*x.strides[:-1], *inner))


def from_panels(
    panels: UInt8[Array, "panels blocks bytes"], format: BlockFormat
) -> UInt8[Array, "panels panel blocks block_bytes"]:
    """The blocks of each row of each panel."""
    count, blocks, _ = panels.shape
    at, fields = 0, []
    for size in format.fields:
        unit = min(size, 4)
        field = panels[..., native.PANEL * at : native.PANEL * (at + size)]
        field = field.reshape(count, blocks, size // unit, native.PANEL, unit)
        fields.append(jnp.transpose(field, (0, 3, 1, 2, 4)).reshape(count, native.PANEL, blocks, size))
        at += size
    return jnp.concatenate(fields, axis=-1)
