"""Products of activations and weights in blocks."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from ..nn.kernels import contract, contract_by_groups, native
from ..parallel import kernel, vary_alike
from .panels import from_panels
from .table import block_format


class Flat(NamedTuple):
    """A weight in blocks as a matrix.

    **Attributes:**

    - `format`: the name of the blocks' format.
    - `panel`: how many rows stand side by side; 1 for blocks as they are in a file.
    """

    format: str
    panel: int


def products(
    x: Float[Array, "rows inputs"], weights: Sequence[UInt8[Array, "_ _ _"]], kinds: Sequence[Flat]
) -> list[Float[Array, "rows _"]]:
    """Multiplies activations by each of some weights in blocks.

    In a program for the CPU one call of a kernel reads all that are in panels; elsewhere XLA dequantizes a weight and
    multiplies. The backward pass dequantizes it too, and keeps nothing but the blocks.

    **Arguments:**

    - `x`: activations.
    - `weights`: of each, the blocks of a row or of a panel of rows, shape `(panels, blocks, bytes)`.
    - `kinds`: what these are.

    **Returns:** sums in float32, for each weight.
    """
    x, *weights = vary_alike(x, *weights)
    return _products(x, tuple(weights), tuple(kinds))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _products(x: Array, weights: tuple[Array, ...], kinds: tuple[Flat, ...]) -> list[Array]:
    def by_xla(x: Array, *weights: Array) -> list[Array]:
        return [_dequantized(x, blocks, kind) for blocks, kind in zip(weights, kinds, strict=True)]

    def by_kernel(x: Array, *weights: Array) -> list[Array]:
        return native.linear(x.astype(jnp.float32), weights, [kind.format for kind in kinds])

    if native.instructions() is None or any(kind.panel == 1 for kind in kinds):
        return by_xla(x, *weights)
    return kernel(lambda *inputs: lax.platform_dependent(*inputs, cpu=by_kernel, default=by_xla))(x, *weights)


def _forward(x: Array, weights: tuple[Array, ...], kinds: tuple[Flat, ...]) -> tuple[Any, Any]:
    # Of `x` only the precision matters to the backward pass.
    return _products(x, weights, kinds), (x[:0], weights)


def _backward(
    kinds: tuple[Flat, ...], saved: tuple[Array, tuple[Array, ...]], gradients: list[Array]
) -> tuple[Array, None]:
    x, weights = saved
    terms = [
        jnp.einsum("ro,oi->ri", d_y, matrix(blocks, *kind).astype(d_y.dtype))
        for d_y, blocks, kind in zip(gradients, weights, kinds, strict=True)
    ]
    return sum(terms[1:], start=terms[0]).astype(x.dtype), None


_products.defvjp(_forward, _backward)


def grouped_products(
    x: Float[Array, "rows inputs"], sizes: Int[Array, "groups"], weights: UInt8[Array, "groups _ _ _"], kind: Flat
) -> Float[Array, "rows _"]:
    """Multiplies each group of activations by its own weight in blocks, of which no other is read or dequantized.

    **Arguments:**

    - `x`: activations, group after group.
    - `sizes`: the number of rows of each group. Results of rows after the last group are arbitrary.
    - `weights`: the stacked weights, as `products` takes them.
    - `kind`: what these are.

    **Returns:** sums in float32.
    """
    return _grouped_products(*vary_alike(x, sizes, weights), kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_products(x: Array, sizes: Array, weights: Array, kind: Flat) -> Array:
    def by_xla(x: Array, sizes: Array, weights: Array) -> Array:
        own = functools.partial(_of_group, weights, kind, x.dtype)
        outputs = weights.shape[1] * kind.panel
        return contract_by_groups(own, outputs, x, sizes, weights).astype(jnp.float32)

    def by_kernel(x: Array, sizes: Array, weights: Array) -> Array:
        return native.grouped_linear(x.astype(jnp.float32), sizes, [weights], [kind.format])[0]

    if native.instructions() is None or kind.panel == 1:
        return by_xla(x, sizes, weights)
    return kernel(lambda *inputs: lax.platform_dependent(*inputs, cpu=by_kernel, default=by_xla))(x, sizes, weights)


def _grouped_forward(x: Array, sizes: Array, weights: Array, kind: Flat) -> tuple[Any, Any]:
    return _grouped_products(x, sizes, weights, kind), (x[:0], sizes, weights)


def _grouped_backward(kind: Flat, saved: tuple[Array, Array, Array], d_y: Array) -> tuple[Array, None, None]:
    x, sizes, weights = saved
    d_x = contract_by_groups(
        lambda group: _of_group(weights, kind, d_y.dtype, group).T, x.shape[1], d_y, sizes, weights
    )
    return d_x.astype(x.dtype), None, None


_grouped_products.defvjp(_grouped_forward, _grouped_backward)


def _of_group(weights: Array, kind: Flat, dtype: jnp.dtype, group: Array) -> Array:
    return matrix(lax.dynamic_index_in_dim(weights, group, keepdims=False), *kind).astype(dtype)


# Traced once for all layers that are alike.
@functools.partial(jax.jit, static_argnames="kind", inline=True)
def _dequantized(x: Array, blocks: Array, kind: Flat) -> Array:
    weight = matrix(blocks, *kind).astype(x.dtype)
    return contract(weight, x[:, None], 1)[:, 0].astype(jnp.float32)


def matrix(blocks: UInt8[Array, "panels blocks bytes"], format: str, panel: int) -> Float[Array, "outputs inputs"]:
    """The numbers of blocks, a row of the weight in each row."""
    kind = block_format(format)
    rows = blocks[:, None] if panel == 1 else from_panels(blocks, kind)
    return kind.dequantize(rows).reshape(blocks.shape[0] * panel, -1)
