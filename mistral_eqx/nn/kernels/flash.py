"""Attention in tiles, which never holds all scores of a sequence at once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ...parallel import vary_alike
from ..mask import attention_mask
from ..precision import at_least_float32
from .splash import in_order, splash_attention, splash_gradients, supports


# Tiles of this many queries and keys: large enough for the matrix kernels, small enough for a CPU's cache.
TILE = 512

_Results = TypeVar("_Results")


class _Inputs(NamedTuple):
    q: Array
    k: Array
    v: Array
    # No gradient.
    first: Any
    last: Any
    kv_positions: Any


def flash_attention(
    q: Float[Array, "batch kv_heads q_per_kv seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    first: Int[Array, "batch seq"],
    last: Int[Array, "batch seq"],
    kv_positions: Int[Array, "batch kv_seq"],
    *,
    scale: float,
) -> tuple[Float[Array, "batch kv_heads q_per_kv seq head_dim"], Float[Array, "batch kv_heads q_per_kv seq"]]:
    """Softmax-weighted sums of values, with a running maximum and sum
    ([FlashAttention](https://arxiv.org/abs/2205.14135), [FlashAttention-2](https://arxiv.org/abs/2307.08691)).

    Memory holds one tile of scores, forward and backward: the backward pass computes the scores again from the saved
    logarithm of each query's sum. Tiles in which no query attends to a key are skipped: half of the work of a causal
    pass, and all but a stripe of a windowed one.

    On TPU, JAX's splash attention kernel does this for float32 and bfloat16, at most 65535 keys, and keys in order of
    position. The keys of a window cache that has wrapped around are not in order. So a TPU program contains both
    implementations, and chooses one at run time by the positions.

    **Arguments:**

    - `q`, `k`, `v`: queries, keys and values.
    - `first`, `last`: the first and the last position that each query attends to; `last` is -1 for padding.
    - `kv_positions`: the position of each key; -1 for padding.
    - `scale`: the factor of the scores.

    **Returns:** one weighted sum for each query, and the logarithm of the sum of its exponentiated scores. For a query
    that attends to no key, these are zeros and the lowest finite number.
    """
    q, k, v = vary_alike(q, k, v)
    return _flash(_Inputs(q, k, v, first, last, kv_positions), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _flash(inputs: _Inputs, scale: float) -> tuple[Array, Array]:
    def by_kernel(inputs: _Inputs) -> tuple[Array, Array]:
        return splash_attention(*inputs, scale=scale)

    return _chosen(by_kernel, functools.partial(_tiles, scale=scale), inputs)


def _forward(inputs: _Inputs, scale: float):
    results: Any = _flash(inputs, scale)
    return results, (inputs, *results)


def _backward(scale: float, saved, gradients):
    inputs, context, log_sum = saved

    def by_kernel(inputs: _Inputs, context: Array, log_sum: Array, d_context: Array, d_log_sum: Array):
        return splash_gradients(*inputs, context, log_sum, d_context, scale=scale)

    def in_tiles(inputs: _Inputs, *others: Array):
        return _gradients_of_tiles(inputs, *others, scale=scale)

    # The kernel has no gradient of `log_sum`, which only the merge over shards of `kv_seq` needs.
    merged = jnp.any(gradients[1] != 0)
    d_q, d_k, d_v = _chosen(by_kernel, in_tiles, inputs, context, log_sum, *gradients, unless=merged)
    return (_Inputs(d_q, d_k, d_v, None, None, None),)


_flash.defvjp(_forward, _backward)


def _chosen(
    by_kernel: Callable[..., _Results],
    in_tiles: Callable[..., _Results],
    inputs: _Inputs,
    *more: Array,
    unless: Array | None = None,
) -> _Results:
    """Chooses the implementation: by the platform at lowering and, on TPU, by the order of the keys at run time."""
    if not supports(inputs.q.dtype, inputs.k.shape[2]):
        return in_tiles(inputs, *more)

    def on_tpu(inputs: _Inputs, *more: Array) -> _Results:
        applies = in_order(inputs.kv_positions)
        return lax.cond(applies if unless is None else applies & ~unless, by_kernel, in_tiles, inputs, *more)

    return lax.platform_dependent(inputs, *more, tpu=on_tpu, default=in_tiles)


def _tiles(inputs: _Inputs, *, scale: float) -> tuple[Array, Array]:
    padded, queries, keys = _tiled(inputs)

    def of_queries(index: Array) -> tuple[Array, Array]:
        q = _slice(padded.q, index, queries, 3)
        first, last = (_slice(x, index, queries, 1) for x in (padded.first, padded.last))

        def add(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            k, v = (_slice(x, number, keys, 2) for x in (padded.k, padded.v))
            kv_positions = _slice(padded.kv_positions, number, keys, 1)

            def attend() -> tuple[Array, Array, Array]:
                context, largest, total = carry
                scores = _scores(q, k, first, last, kv_positions, scale)
                higher = jnp.maximum(largest, jnp.max(scores, axis=-1))
                weights, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(largest - higher)
                more = _product("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), v)
                return context * shrink[..., None] + more, higher, total * shrink + jnp.sum(weights, axis=-1)

            return lax.cond(_touches(first, last, kv_positions), attend, lambda: carry)

        zeros = q.astype(at_least_float32(q.dtype)) * 0
        row = jnp.sum(zeros, axis=-1)
        lowest = jnp.finfo(row.dtype).min
        start = zeros, row + lowest, row
        context, largest, total = lax.fori_loop(0, padded.k.shape[2] // keys, add, start)
        # A query that attends to nothing may have met masked scores, which are all the lowest number.
        empty = (largest <= lowest) | (total == 0)
        context = jnp.where(empty[..., None], 0, context / jnp.where(empty, 1, total)[..., None])
        return context, jnp.where(empty, lowest, largest + jnp.log(jnp.where(empty, 1, total)))

    context, log_sum = lax.map(of_queries, jnp.arange(padded.q.shape[3] // queries))
    seq = inputs.q.shape[3]
    return _joined(context, seq), _joined(log_sum, seq)


def _gradients_of_tiles(
    inputs: _Inputs, context: Array, log_sum: Array, d_context: Array, d_log_sum: Array, *, scale: float
) -> tuple[Array, Array, Array]:
    padded, queries, keys = _tiled(inputs)
    # The term of the scores' gradient that all keys of a query share: through its weighted sum and `log_sum`.
    of_sum = d_log_sum - jnp.sum(d_context * context, axis=-1)
    seq, width = inputs.q.shape[3], padded.q.shape[3]
    d_context, log_sum, of_sum = (_pad(x, width - seq, 3) for x in (d_context, log_sum, of_sum))

    def of_keys(d_q: Array, number: Array):
        k, v = (_slice(x, number, keys, 2) for x in (padded.k, padded.v))
        kv_positions = _slice(padded.kv_positions, number, keys, 1)

        def add(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            first, last = (_slice(x, index, queries, 1) for x in (padded.first, padded.last))
            q, d_out = _slice(padded.q, index, queries, 3), _slice(d_context, index, queries, 3)

            def attend() -> tuple[Array, Array, Array]:
                d_q, d_k, d_v = carry
                scores = _scores(q, k, first, last, kv_positions, scale)
                mask = attention_mask(first, last, kv_positions)[:, None, None]
                weights = jnp.where(mask, jnp.exp(scores - _slice(log_sum, index, queries, 3)[..., None]), 0)
                d_weights = _product("bhgqd,bhkd->bhgqk", d_out.astype(v.dtype), v)
                d_scores = weights * (d_weights + _slice(of_sum, index, queries, 3)[..., None]) * scale
                more = _product("bhgqk,bhkd->bhgqd", d_scores.astype(k.dtype), k)
                d_q = lax.dynamic_update_slice_in_dim(
                    d_q, _slice(d_q, index, queries, 3) + more, index * queries, axis=3
                )
                d_k = d_k + _product("bhgqk,bhgqd->bhkd", d_scores.astype(q.dtype), q)
                d_v = d_v + _product("bhgqk,bhgqd->bhkd", weights.astype(d_out.dtype), d_out)
                return d_q, d_k, d_v

            return lax.cond(_touches(first, last, kv_positions), attend, lambda: carry)

        zeros = k.astype(d_q.dtype) * 0
        d_q, d_k, d_v = lax.fori_loop(0, width // queries, add, (d_q, zeros, zeros))
        return d_q, (d_k, d_v)

    start = padded.q.astype(at_least_float32(inputs.q.dtype)) * 0
    d_q, (d_k, d_v) = lax.scan(of_keys, start, jnp.arange(padded.k.shape[2] // keys))
    kv_seq = inputs.k.shape[2]
    d_k, d_v = (jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, x.shape[-1])[:, :, :kv_seq] for x in (d_k, d_v))
    d_q, dtype = d_q[:, :, :, :seq], inputs.q.dtype
    return d_q.astype(dtype), d_k.astype(dtype), d_v.astype(dtype)


def _tiled(inputs: _Inputs) -> tuple[_Inputs, int, int]:
    """The inputs, padded to whole tiles, and the numbers of queries and keys in a tile."""
    seq, kv_seq = inputs.q.shape[3], inputs.k.shape[2]
    queries, keys = min(TILE, seq), min(TILE, kv_seq)
    more, more_keys = -seq % queries, -kv_seq % keys
    padded = _Inputs(
        _pad(inputs.q, more, 3),
        _pad(inputs.k, more_keys, 2),
        _pad(inputs.v, more_keys, 2),
        _pad(inputs.first, more, 1),
        _pad(inputs.last, more, 1, -1),
        _pad(inputs.kv_positions, more_keys, 1, -1),
    )
    return padded, queries, keys


def _pad(x: Array, more: int, axis: int, value: int = 0) -> Array:
    widths = [(0, more if at == axis else 0) for at in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if more else x


def _slice(x: Array, index: Array, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _joined(tiles: Array, seq: int) -> Array:
    """Joins tiles of queries along the sequence."""
    tiles = jnp.moveaxis(tiles, 0, 3)
    return tiles.reshape(*tiles.shape[:3], -1, *tiles.shape[5:])[:, :, :, :seq]


def _touches(first: Array, last: Array, kv_positions: Array) -> Array:
    """Whether any query of one tile may attend to any key of another."""
    highest = jnp.iinfo(jnp.int32).max
    keys, attends = kv_positions >= 0, last >= first
    nearest, furthest = jnp.where(keys, kv_positions, highest), jnp.where(keys, kv_positions, -1)
    begin, end = jnp.where(attends, first, highest), jnp.where(attends, last, -1)
    touches = jnp.max(end, axis=1) >= jnp.min(nearest, axis=1)
    return jnp.any(touches & (jnp.min(begin, axis=1) <= jnp.max(furthest, axis=1)))


def _scores(
    q: Array, k: Array, first: Array, last: Array, kv_positions: Array, scale: float
) -> Float[Array, "batch kv_heads q_per_kv seq kv_seq"]:
    scores = _product("bhgqd,bhkd->bhgqk", q, k) * scale
    return jnp.where(attention_mask(first, last, kv_positions)[:, None, None], scores, jnp.finfo(scores.dtype).min)


def _product(dims: str, x: Array, y: Array) -> Array:
    """An einsum with batch and heads merged into one dimension: XLA on CPU cannot run it over two."""
    left, right, out = (term.replace("bh", "n") for term in dims.replace("->", ",").split(","))
    batch, heads = x.shape[:2]
    product = jnp.einsum(
        f"{left},{right}->{out}",
        x.reshape(batch * heads, *x.shape[2:]),
        y.reshape(batch * heads, *y.shape[2:]),
        preferred_element_type=at_least_float32(x.dtype),
    )
    return product.reshape(batch, heads, *product.shape[1:])
