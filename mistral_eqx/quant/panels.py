"""Panels: the blocks of several rows side by side, in the order in which the kernels read them.

Of each field of a block a panel has first the leading 4 bytes of all rows, then the next 4, and so on, so that a vector
register has the same codes of all rows. Fields of 2 bytes keep these together.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from ..nn.kernels import native
from .layout import BlockFormat


def to_panels(blocks: UInt8[np.ndarray, "... bytes"], format: BlockFormat, rows_axis: int = -3) -> np.ndarray:
    """Arranges blocks in panels.

    **Arguments:**

    - `blocks`: the blocks of rows, shape `(..., rows, ..., bytes)`; the number of rows is a multiple of `native.PANEL`.
    - `format`: their format.
    - `rows_axis`: the axis of the rows; all between it and the last are of blocks.

    **Returns:** shape `(..., rows / PANEL, ..., PANEL * bytes)`.
    """
    (*outer, rows), inner = blocks.shape[: rows_axis % blocks.ndim + 1], blocks.shape[rows_axis % blocks.ndim + 1 : -1]
    nbytes, count = blocks.shape[-1], math.prod(inner)
    panels = np.empty((*outer, rows // native.PANEL, count, native.PANEL * nbytes), np.uint8)
    blocks = blocks.reshape(*outer, rows // native.PANEL, native.PANEL, count, nbytes)
    at = 0
    for size in format.fields:
        unit = min(size, 4)
        field = blocks[..., at : at + size].reshape(*blocks.shape[:-1], size // unit, unit)
        panel = panels[..., native.PANEL * at : native.PANEL * (at + size)]
        panel.reshape(*panel.shape[:-1], size // unit, native.PANEL, unit)[...] = np.moveaxis(field, -4, -2)
        at += size
    return panels.reshape(*outer, rows // native.PANEL, *inner, native.PANEL * nbytes)


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
