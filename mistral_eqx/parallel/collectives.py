"""All collective operations, which no other file names, and what depends on a device's index on the mesh."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .codes import are_coded, block_size, decode, encode
from .strategy import Strategy


def psum(x: Array, dims: str, strategy: Strategy) -> Array:
    """Adds up partial sums over the devices among which `strategy` splits a contracted dimension.

    **Arguments:**

    - `x`: this device's partial sum, any shape.
    - `dims`: the dimensions that were summed over, such as `"kv_heads q_per_kv head_dim"`.
    - `strategy`: which dimensions are split over which mesh axes.

    **Returns:** the sum, on every device; `x` itself if nothing is split.
    """
    axes = strategy.axes(dims)
    return lax.psum(x, axes) if axes else x


def pmax(x: Array, dims: str, strategy: Strategy) -> Array:
    """The elementwise maximum over the devices among which any of `dims` is split; no gradient passes."""
    axes = strategy.axes(dims)
    return lax.pmax(lax.stop_gradient(x), axes) if axes else x


def pmin(x: Array, dims: str, strategy: Strategy) -> Array:
    """The elementwise minimum over the devices among which any of `dims` is split; no gradient passes."""
    axes = strategy.axes(dims)
    return lax.pmin(lax.stop_gradient(x), axes) if axes else x


def psum_together(first: Array, second: Array, dims: str, strategy: Strategy) -> tuple[Array, Array]:
    """`psum` of two arrays in one collective; their shapes may differ in the last axis only."""
    if not strategy.axes(dims):
        return first, second
    both = psum(jnp.concatenate([first, second], axis=-1), dims, strategy)
    return both[..., : first.shape[-1]], both[..., first.shape[-1] :]


def psum_varying(scalars: Sequence[Array]) -> Array:
    """The sum of scalars, each added up over the mesh axes along which it varies; a replicated scalar counts once.

    It adds the squares of gradients of split and of replicated weights, with one psum for each set of varying axes.
    """
    by_axes: dict[tuple[str, ...], Array] = {}
    for scalar in scalars:
        axes = tuple(sorted(jax.typeof(scalar).manual_axis_type.varying))
        by_axes[axes] = by_axes[axes] + scalar if axes in by_axes else scalar
    return functools.reduce(jnp.add, (lax.psum(total, axes) if axes else total for axes, total in by_axes.items()))


def largest_anywhere(x: Array) -> Array:
    """The elementwise maximum over all mesh axes along which an array varies; no gradient passes."""
    axes = tuple(sorted(jax.typeof(x).manual_axis_type.varying))
    return lax.pmax(lax.stop_gradient(x), axes) if axes else x


def psum_tokens(x: Array, dims: str, strategy: Strategy, *, done: Sequence[str] = ()) -> Array:
    """Like `psum` for the residual stream: where `strategy` splits `tokens`, each device receives its own tokens only.

    A `seq` that is not a multiple of the number of devices, such as the 1 of a decoding step, stays whole.

    With `exchange=int8`, the partial sums of 32 tokens and more travel as int8 codes. A device adds up those of its
    share in float32. An all-reduce rounds the result again, to codes that all devices gather.

    **Arguments:**

    - `x`: this device's partial sums for all tokens, shape `(batch, seq, ...)`.
    - `dims`, `strategy`: as for `psum`.
    - `done`: mesh axes over which the sums are complete, each device with its own tokens.
    """
    axes = tuple(axis for axis in strategy.axes(dims) if axis not in done)
    scattered = tuple(axis for axis in strategy.axes("tokens") if axis not in done) if axes else ()
    devices, coded = lax.axis_size(scattered) if scattered else 1, are_coded(strategy, x.shape[1])
    if devices == 1 or x.shape[1] % devices:
        return _sum(x, axes, coded)
    x = _sum(x, tuple(axis for axis in axes if axis not in scattered), coded)
    if not coded:
        return lax.psum_scatter(x, scattered, scatter_dimension=1, tiled=True)
    own = x.reshape(len(x), devices, -1, *x.shape[2:])
    return _sum_of_codes(_in_blocks(jnp.moveaxis(own, 1, 0)), scattered).reshape(own[:, 0].shape).astype(x.dtype)


def _sum(x: Array, axes: tuple[str, ...], coded: bool) -> Array:
    if not axes or not coded or lax.axis_size(axes) == 1:
        return lax.psum(x, axes) if axes else x
    blocks, devices = _in_blocks(x[None])[0], lax.axis_size(axes)
    shares = jnp.pad(blocks, ((0, -len(blocks) % devices), (0, 0))).reshape(devices, -1, blocks.shape[1])
    sums = lax.all_gather(encode(_sum_of_codes(shares, axes)), axes, to="invarying")
    return decode(sums, blocks.shape[1]).reshape(-1, blocks.shape[1])[: len(blocks)].reshape(x.shape).astype(x.dtype)


def _in_blocks(x: Array) -> Array:
    """From `(shares, batch, seq, ...)` to `(shares, blocks, block)`; the numbers of a block are of one token."""
    return x.reshape(len(x), -1, block_size(math.prod(x.shape[3:])))


def _sum_of_codes(shares: Array, axes: tuple[str, ...]) -> Array:
    """The sum of this device's share, in float32, from shares `(devices, blocks, block)` of all devices."""
    (shares,) = _varying(axes, (shares,))
    return jnp.sum(decode(lax.all_to_all(encode(shares), axes, 0, 0, tiled=True), shares.shape[2]), axis=0)


def all_tokens(x: Array, seq: int, strategy: Strategy, *, to: str = "varying") -> Array:
    """Gathers the tokens that `psum_tokens` scattered; `x` itself if it has all `seq` of them.

    With `exchange=int8`, 32 tokens and more travel as int8 codes, and each device rounds its own tokens too.

    **Arguments:**

    - `x`: shape `(batch, tokens, ...)`.
    - `to`: `"invarying"` marks the result as the same on all devices. After `"varying"`, the gradient is scattered
        directly, without a psum first.
    """
    if x.shape[1] == seq or not are_coded(strategy, seq):
        return x if x.shape[1] == seq else lax.all_gather(x, strategy.axes("tokens"), axis=1, tiled=True, to=to)
    blocks = _in_blocks(x[None])[0]
    codes = lax.all_gather(encode(blocks), strategy.axes("tokens"), to=to)
    whole = jnp.moveaxis(decode(codes, blocks.shape[1]).reshape(-1, *x.shape), 0, 1)
    return whole.reshape(len(x), seq, *x.shape[2:]).astype(x.dtype)


def own_tokens(x: Array, tokens: int, strategy: Strategy) -> Array:
    """This device's `tokens` of an array `(batch, seq, ...)` that has all tokens; `x` itself if these are all."""
    return x if x.shape[1] == tokens else own_shard(x, strategy.axes("tokens"), axis=1)


def own_slices(x: Array, strategy: Strategy, *, axis: int, hop: int = 0) -> Array:
    """This device's tokens of an array that has all tokens; `x` itself where `strategy` does not split `seq`.

    The order is a zigzag: of `2 n` equal slices along `axis`, device `i` of `n` has the slices `i` and `2 n - 1 - i`.
    With a causal mask, all devices then have the same work. Devices exchange nothing.

    **Arguments:**

    - `hop`: takes the tokens of the device that is so many places before this one on the ring.
    """
    shard, shards = shard_index("seq", strategy)
    if shards == 1:
        return x
    first, size = (shard - hop) % shards, x.shape[axis] // (2 * shards)
    slices = [lax.dynamic_slice_in_dim(x, at * size, size, axis) for at in (first, 2 * shards - 1 - first)]
    return jnp.concatenate(slices, axis=axis)


def send_on(x: Array, hops: int, strategy: Strategy, *, dims: str = "seq") -> Array:
    """Sends an array to the device so many places ahead on the ring that splits `dims`, and receives another one's."""
    axes = strategy.axes(dims)
    devices = lax.axis_size(axes)
    return lax.ppermute(x, axes, [(at, (at + hops) % devices) for at in range(devices)]) if hops else x


def all_slices(x: Array, strategy: Strategy, *, axis: int) -> Array:
    """Gathers the slices that `own_slices` took, in the order of the tokens."""
    axes = strategy.axes("seq")
    devices = lax.axis_size(axes)
    slices = jnp.split(lax.all_gather(x, axes, axis=axis, tiled=True, to="varying"), 2 * devices, axis=axis)
    return jnp.concatenate([*slices[::2], *slices[::-2]], axis=axis)


def last_token(x: Array, strategy: Strategy) -> Array:
    """The last token of an array `(batch, own, ...)`, on all devices that split `seq`; it is the last of the first."""
    shard, _ = shard_index("seq", strategy)
    return lax.psum(jnp.where(jnp.asarray(shard) == 0, x[:, -1:], 0), strategy.axes("seq"))


def in_order(x: Array, strategy: Strategy) -> Array:
    """The tokens of an array `(batch, own, ...)` in order: device `d` receives the slices `2 d` and `2 d + 1`.

    One of a device's two slices has an even number, so the devices exchange even slices, and then odd ones.
    """
    shard, shards = shard_index("seq", strategy)
    if shards == 1:
        return x
    first, second = jnp.split(x, 2, axis=1)
    is_even = jnp.asarray(shard) % 2 == 0
    found = []
    for parity, own in enumerate((jnp.where(is_even, first, second), jnp.where(is_even, second, first))):
        slices = [at if at % 2 == parity else 2 * shards - 1 - at for at in range(shards)]
        found.append(lax.ppermute(own, strategy.axes("seq"), [(at, to // 2) for at, to in enumerate(slices)]))
    return jnp.concatenate(found, axis=1)


def gather(x: Array, dims: str, strategy: Strategy, *, axis: int) -> Array:
    """Gathers, along `axis`, the shards of all devices among which `dims` are split."""
    axes = strategy.axes(dims)
    return lax.all_gather(x, axes, axis=axis, tiled=True, to="invarying") if axes else x


def next_stage(x: Array, strategy: Strategy, *, back: bool = False) -> Array:
    """Sends an array to the device that has the next layers, and receives that of the device before; the first gets 0.

    **Arguments:**

    - `back`: sends to the device that has the layers before, and the last gets 0.
    """
    axes = strategy.axes("layers")
    pairs = [(at, at + 1) for at in range(lax.axis_size(axes) - 1)]
    return lax.ppermute(x, axes, [pair[::-1] for pair in pairs] if back else pairs) if pairs else x


def of_last_stage(x: Array, strategy: Strategy) -> Array:
    """An array of the devices that have the last layers, and zeros on others; `x` where `layers` is not split."""
    stage, stages = shard_index("layers", strategy)
    return jnp.where(stage == stages - 1, x, 0) if strategy.axes("layers") else x


def from_last_stage(x: Array, strategy: Strategy) -> Array:
    """Sends an array of the devices that have the last layers to those of all stages."""
    return psum(of_last_stage(x, strategy), "layers", strategy)


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
    """Marks arrays as varying along all mesh axes along which one of them varies, as the carry of a loop must be.

    Along an axis on which an array was not varying, its gradient is then added up.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    return _varying(sorted(axes), arrays)


def vary(x: Array, axes: Sequence[str]) -> Array:
    """Marks a replicated array as varying along mesh axes; each device then has its own gradient of it."""
    return lax.pcast(x, tuple(axes), to="varying")


def vary_over(dims: str, strategy: Strategy, *arrays: Array) -> tuple[Array, ...]:
    """Marks arrays as varying along the mesh axes that split any of `dims`; their gradients are then added up there."""
    return _varying(strategy.axes(dims), arrays)


def _varying(axes: Sequence[str], arrays: Sequence[Array]) -> tuple[Array, ...]:
    missing = [tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying) for x in arrays]
    return tuple(lax.pcast(x, more, to="varying") if more else x for x, more in zip(arrays, missing, strict=True))


def own_shard(x: Array, axes: Sequence[str], *, axis: int) -> Array:
    """This device's shard of an array that is replicated along mesh axes; devices exchange nothing."""
    axes = tuple(axes)
    if not axes:
        return x
    size = x.shape[axis] // lax.axis_size(axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * size, size, axis)


def gather_shards(x: Array, axes: Sequence[str], *, axis: int, to: str) -> Array:
    """Gathers the shards that `own_shard` made.

    **Arguments:**

    - `to`: `"invarying"` marks the result as the same on all devices. After `"varying"`, each device has its own
        gradient, and receives its shard of the sum of all gradients.
    """
    return lax.all_gather(x, tuple(axes), axis=axis, tiled=True, to=to)


def scatter_sum(x: Array, axes: Sequence[str], *, axis: int) -> Array:
    """This device's shard of the sum over mesh axes; the whole sum if `axis` is -1."""
    if axis < 0:
        return lax.psum(x, tuple(axes))
    return lax.psum_scatter(x, tuple(axes), scatter_dimension=axis, tiled=True)


def all_to_all(x: Array, axes: Sequence[str]) -> Array:
    """Sends entry `d` of the first axis to device `d` along mesh axes; entry `d` of the result is from device `d`."""
    return lax.all_to_all(x, tuple(axes), 0, 0, tiled=True)


def holders(dims: str, axes: Sequence[str], strategy: Strategy) -> tuple[Array, int]:
    """Where the shards of some dimensions are, for an exchange along some of the mesh axes that split them.

    **Returns:** for each shard, the index along `axes` of the device that has it, or the number of devices along `axes`
    if that device differs from this one along another axis; and that number.
    """
    split = strategy.axes(dims)
    sizes = [lax.axis_size(axis) for axis in split]
    found = dict(zip(split, np.unravel_index(np.arange(math.prod(sizes)), sizes), strict=True))
    index = np.ravel_multi_index([found[axis] for axis in axes], [lax.axis_size(axis) for axis in axes])
    devices, is_near = lax.axis_size(tuple(axes)), jnp.ones(len(index), bool)
    for axis in split:
        if axis not in axes:
            is_near &= jnp.asarray(found[axis], jnp.int32) == lax.axis_index(axis)
    return jnp.where(is_near, jnp.asarray(index, jnp.int32), devices), devices


def shard_index(dims: str, strategy: Strategy) -> tuple[Array | int, int]:
    """The shard index of this device along `dims`, and the number of shards."""
    axes = strategy.axes(dims)
    return (lax.axis_index(axes), lax.axis_size(axes)) if axes else (0, 1)
