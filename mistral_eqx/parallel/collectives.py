"""The only file that names a collective operation, and what a device does by its place on the mesh."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from .strategy import Strategy


def psum(x: Array, dims: str, strategy: Strategy) -> Array:
    """Adds up partial sums over the devices among which `strategy` splits a contracted dimension.

    **Arguments:**

    - `x`: this device's partial sum, any shape.
    - `dims`: the dimensions that were summed over, such as `"kv_heads q_per_kv head_dim"`.
    - `strategy`: tells which mesh axes split them.

    **Returns:** the sum, on every device; `x` itself if nothing is split.
    """
    axes = strategy.axes(dims)
    return lax.psum(x, axes) if axes else x


def pmax(x: Array, dims: str, strategy: Strategy) -> Array:
    """The largest `x` of the devices among which any of `dims` is split; no gradient passes."""
    axes = strategy.axes(dims)
    return lax.pmax(lax.stop_gradient(x), axes) if axes else x


def pmin(x: Array, dims: str, strategy: Strategy) -> Array:
    """The smallest `x` of the devices among which any of `dims` is split; no gradient passes."""
    axes = strategy.axes(dims)
    return lax.pmin(lax.stop_gradient(x), axes) if axes else x


def psum_together(first: Array, second: Array, dims: str, strategy: Strategy) -> tuple[Array, Array]:
    """`psum` of two arrays in one exchange; they agree in all axes but the last."""
    if not strategy.axes(dims):
        return first, second
    both = psum(jnp.concatenate([first, second], axis=-1), dims, strategy)
    return both[..., : first.shape[-1]], both[..., first.shape[-1] :]


def psum_varying(parts: Sequence[Array]) -> Array:
    """The sum of scalars, each added up over the devices among which it differs; those that are the same count once.

    So the squares of all gradients are summed, of weights that are split and of those that are not: one exchange for
    each set of mesh axes along which some of them are split.
    """
    by_axes: dict[tuple[str, ...], Array] = {}
    for part in parts:
        axes = tuple(sorted(jax.typeof(part).manual_axis_type.varying))
        by_axes[axes] = by_axes[axes] + part if axes in by_axes else part
    return functools.reduce(jnp.add, (lax.psum(part, axes) if axes else part for axes, part in by_axes.items()))


def psum_tokens(x: Array, dims: str, strategy: Strategy) -> Array:
    """Like `psum` for the residual stream: where `strategy` splits `tokens`, each device receives its own tokens only.

    A length that cannot be cut into equal parts, such as the one token of a decoding step, stays whole.

    **Arguments:**

    - `x`: this device's partial sums for all tokens, shape `(batch, seq, ...)`.
    - `dims`, `strategy`: as for `psum`.
    """
    axes = strategy.axes(dims)
    scattered = strategy.axes("tokens") if axes else ()
    devices = lax.axis_size(scattered) if scattered else 1
    if devices == 1 or x.shape[1] % devices:
        return psum(x, dims, strategy)
    rest = tuple(axis for axis in axes if axis not in scattered)
    x = lax.psum(x, rest) if rest else x
    return lax.psum_scatter(x, scattered, scatter_dimension=1, tiled=True)


def all_tokens(x: Array, seq: int, strategy: Strategy, *, to: str = "varying") -> Array:
    """Puts together the tokens that `psum_tokens` gave to each device; `x` itself if it has all `seq` of them.

    **Arguments:**

    - `x`: shape `(batch, tokens, ...)`.
    - `to`: `"invarying"` if all devices are to know that they have the same. Otherwise the gradient is scattered right
        away and not added up everywhere first.
    """
    return x if x.shape[1] == seq else lax.all_gather(x, strategy.axes("tokens"), axis=1, tiled=True, to=to)


def gather(x: Array, dims: str, strategy: Strategy, *, axis: int) -> Array:
    """Puts together the parts of all devices among which `dims` are split, along `axis`."""
    axes = strategy.axes(dims)
    return lax.all_gather(x, axes, axis=axis, tiled=True, to="invarying") if axes else x


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """Marks arrays as different along all mesh axes along which one of them is, as a loop over them asks for.

    The gradient of an array that is the same along an axis is then added up there.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    missing = [tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying)) for x in arrays]
    return tuple(lax.pcast(x, more, to="varying") if more else x for x, more in zip(arrays, missing, strict=True))


def vary(x: Array, axes: Sequence[str]) -> Array:
    """Marks an array that is the same along mesh axes as different there: each device then takes its own gradient."""
    return lax.pcast(x, tuple(axes), to="varying")


def own_part(x: Array, axes: Sequence[str], *, axis: int) -> Array:
    """This device's part of an array that all devices along some mesh axes have; nothing is exchanged."""
    axes = tuple(axes)
    if not axes:
        return x
    size = x.shape[axis] // lax.axis_size(axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * size, size, axis)


def gather_parts(x: Array, axes: Sequence[str], *, axis: int, to: str) -> Array:
    """Puts together what `own_part` gave to each device.

    **Arguments:**

    - `to`: `"invarying"` if all devices are to know that they have the same. After `"varying"` each has a gradient of
        its own; these are summed up, and each device receives its part of the sum.
    """
    return lax.all_gather(x, tuple(axes), axis=axis, tiled=True, to=to)


def scatter_sum(x: Array, axes: Sequence[str], *, axis: int) -> Array:
    """This device's part of the sum over devices along some mesh axes; all of the sum if `axis` is -1."""
    if axis < 0:
        return lax.psum(x, tuple(axes))
    return lax.psum_scatter(x, tuple(axes), scatter_dimension=axis, tiled=True)


def place(dims: str, strategy: Strategy) -> tuple[Array | int, int]:
    """Which of the parts of `dims` this device has, and how many there are."""
    axes = strategy.axes(dims)
    return (lax.axis_index(axes), lax.axis_size(axes)) if axes else (0, 1)
