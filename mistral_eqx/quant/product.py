"""The product of activations and a weight in blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from ..nn.kernels import contract, native
from ..parallel import kernel, vary_alike
from .panels import from_panels
from .table import block_format


def product(
    x: Float[Array, "rows inputs"], blocks: UInt8[Array, "panels blocks bytes"], format: str, panel: int
) -> Float[Array, "rows outputs"]:
    """Multiplies activations by a weight in blocks.

    In a program for the CPU a kernel reads the blocks, if the weight is in panels; elsewhere XLA dequantizes the weight
    and multiplies. The backward pass dequantizes it too, and keeps nothing but the blocks.

    **Arguments:**

    - `x`: activations.
    - `blocks`: the blocks of a row, or of a panel of rows.
    - `format`: the name of their format.
    - `panel`: how many rows stand side by side; 1 for blocks as they are in a file.

    **Returns:** sums in float32.
    """
    x, blocks = vary_alike(x, blocks)
    return _product(x, blocks, format, panel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, blocks: Array, format: str, panel: int) -> Array:
    dequantized = functools.partial(_dequantized, format=format, panel=panel)
    if panel == 1 or native.instructions() is None:
        return dequantized(x, blocks)
    by_kernel = functools.partial(_by_kernel, format=format)
    return kernel(lambda *inputs: lax.platform_dependent(*inputs, cpu=by_kernel, default=dequantized))(x, blocks)


def _forward(x: Array, blocks: Array, format: str, panel: int) -> tuple[Any, Any]:
    # Of `x` only the precision matters to the backward pass.
    return _product(x, blocks, format, panel), (x[:0], blocks)


def _backward(format: str, panel: int, saved: tuple[Array, Array], d_y: Array) -> tuple[Array, None]:
    x, blocks = saved
    weight = matrix(blocks, format, panel)
    return jnp.einsum("ro,oi->ri", d_y, weight.astype(d_y.dtype)).astype(x.dtype), None


_product.defvjp(_forward, _backward)


def _by_kernel(x: Array, blocks: Array, format: str) -> Array:
    return native.linear(x.astype(jnp.float32), blocks, format)


# Traced once for all layers that are alike.
@functools.partial(jax.jit, static_argnames=("format", "panel"), inline=True)
def _dequantized(x: Array, blocks: Array, format: str, panel: int) -> Array:
    weight = matrix(blocks, format, panel).astype(x.dtype)
    return contract(weight, x[:, None], 1)[:, 0].astype(jnp.float32)


def matrix(blocks: UInt8[Array, "panels blocks bytes"], format: str, panel: int) -> Float[Array, "outputs inputs"]:
    """The numbers of blocks, a row of the weight in each row."""
    kind = block_format(format)
    rows = blocks[:, None] if panel == 1 else from_panels(blocks, kind)
    return kind.dequantize(rows).reshape(blocks.shape[0] * panel, -1)
