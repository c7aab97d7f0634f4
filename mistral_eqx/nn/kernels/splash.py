"""Attention by JAX's splash attention kernel for TPUs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ...parallel import kernel


# The kernel receives the slots of a query's span as the two halves of one 32-bit number.
_MOST_KEYS = 2**16 - 1

# Block sizes are multiples of the lanes of a vector register; blocks of this size fit into the fast memory.
_LANES = 128
_LARGEST_BLOCK = 512


def supports(dtype: jnp.dtype, kv_seq: int) -> bool:
    """Whether the kernel supports this precision and this number of keys."""
    return dtype in (jnp.float32, jnp.bfloat16) and kv_seq <= _MOST_KEYS


def in_order(kv_positions: Int[Array, "batch kv_seq"]) -> Bool[Array, ""]:
    """Whether the positions of keys increase in each row, padding aside.

    This holds for a sequence and for a cache, except for a window cache that has wrapped around.
    """
    before = jnp.pad(lax.cummax(kv_positions, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jnp.all((kv_positions < 0) | (kv_positions > before))


def splash_attention(
    q: Float[Array, "batch kv_heads q_per_kv seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    first: Int[Array, "batch seq"],
    last: Int[Array, "batch seq"],
    kv_positions: Int[Array, "batch kv_seq"],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "batch kv_heads q_per_kv seq head_dim"], Float[Array, "batch kv_heads q_per_kv seq"]]:
    """Computes what [`mistral_eqx.nn.flash_attention`][] returns, with
    [splash attention](https://github.com/jax-ml/jax/tree/main/jax/experimental/pallas/ops/tpu/splash_attention).

    The kernel's mask is one interval of slots for each query, without the slots of padding, so the keys must be
    `in_order`. Blocks in which no query attends to a key are skipped.

    **Arguments:** as for `flash_attention`, and

    - `interpret`: whether Pallas interprets the kernel, which works on any platform.
    """
    begin, end = _slots(first, last, kv_positions)
    rows = jax.vmap(functools.partial(_forward, interpret=interpret))
    context, log_sum = kernel(rows)(q * scale, k, v, begin, end, kv_positions >= 0)
    attends = (begin < end)[:, None, None]
    # For a query that attends to nothing, the results of the kernel have no meaning.
    context = jnp.where(attends[..., None], context.astype(log_sum.dtype), 0)
    return context, jnp.where(attends, log_sum, jnp.finfo(log_sum.dtype).min)


def splash_gradients(
    q: Float[Array, "batch kv_heads q_per_kv seq head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    first: Int[Array, "batch seq"],
    last: Int[Array, "batch seq"],
    kv_positions: Int[Array, "batch kv_seq"],
    context: Float[Array, "batch kv_heads q_per_kv seq head_dim"],
    log_sum: Float[Array, "batch kv_heads q_per_kv seq"],
    d_context: Float[Array, "batch kv_heads q_per_kv seq head_dim"],
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[
    Float[Array, "batch kv_heads q_per_kv seq head_dim"],
    Float[Array, "batch kv_heads kv_seq head_dim"],
    Float[Array, "batch kv_heads kv_seq head_dim"],
]:
    """The gradients of `q`, `k` and `v`.

    **Arguments:** as for `splash_attention`, and

    - `context`, `log_sum`: the results of `splash_attention`.
    - `d_context`: the gradient of `context`. `log_sum` must have no gradient: the kernel does not support one.
    """
    begin, end = _slots(first, last, kv_positions)
    attends = (begin < end)[:, None, None]
    log_sum, d_context = jnp.where(attends, log_sum, 0), jnp.where(attends[..., None], d_context, 0)
    rows = jax.vmap(functools.partial(_backward, interpret=interpret))
    results = context, log_sum, d_context.astype(q.dtype)
    d_q, d_k, d_v = kernel(rows)(q * scale, k, v, begin, end, kv_positions >= 0, *results)
    return d_q * scale, d_k, d_v


def _slots(first: Array, last: Array, kv_positions: Array) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"]]:
    """The first slot that each query attends to and the slot after the last; both are equal if it attends to none."""
    reached = lax.cummax(kv_positions, axis=1)
    begin = jax.vmap(functools.partial(jnp.searchsorted, side="left"))(reached, jnp.maximum(first, 0))
    end = jax.vmap(functools.partial(jnp.searchsorted, side="right"))(reached, last)
    return begin, jnp.maximum(begin, end)


def _forward(
    q: Array, k: Array, v: Array, begin: Array, end: Array, real: Array, *, interpret: bool
) -> tuple[Array, Array]:
    """The kernel on one row."""
    library = _library()
    row = _Row.init(q, k, v, begin, end, real)
    attention = library.SplashAttentionKernel(
        row.of_keys, None, None, save_residuals=True, is_mqa=False, interpret=interpret, **row.options()
    )
    context, (log_sum,) = attention(row.q, row.k, row.v, row.segments)
    return _restored(context, q), _restored(log_sum, q)


def _backward(
    q: Array,
    k: Array,
    v: Array,
    begin: Array,
    end: Array,
    real: Array,
    context: Array,
    log_sum: Array,
    d_context: Array,
    *,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """The kernels of the gradients on one row."""
    row = _Row.init(q, k, v, begin, end, real)
    context, log_sum, d_context = (row.heads(x) for x in (context, log_sum, d_context))
    saved = row.q, row.k, row.v, row.segments, None, context, log_sum, row.of_keys, row.of_queries
    # Called directly: `jax.grad` in a `shard_map` would pass arrays that are not marked as this function expects.
    *_, d_q, d_k, d_v, _, _ = _library()._splash_attention_bwd(
        save_residuals=False, is_mqa=False, interpret=interpret, res=saved, do=d_context, **row.options()
    )
    return _restored(d_q, q), d_k[:, : k.shape[1]], d_v[:, : k.shape[1]]


class _Row(NamedTuple):
    """The inputs of the kernels for one row: whole blocks, and which of them to run."""

    q: Array
    k: Array
    v: Array
    segments: Any
    of_keys: Any
    of_queries: Any
    queries: int
    keys: int

    @classmethod
    def init(cls, q: Array, k: Array, v: Array, begin: Array, end: Array, real: Array) -> "_Row":
        from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

        queries, keys = _block(q.shape[2]), _block(k.shape[1])
        k, v, real = (_pad(x, keys, axis) for x, axis in ((k, 1), (v, 1), (real.astype(jnp.int32), 0)))
        begin, end = _pad(begin, queries, 0), _pad(end, queries, 0)
        starts = jnp.arange(0, k.shape[1], keys, dtype=jnp.int32)[None]
        nearest = jnp.min(jnp.where(begin < end, begin, k.shape[1]).reshape(-1, queries), axis=1)[:, None]
        furthest = jnp.max(end.reshape(-1, queries), axis=1)[:, None]
        touched = (nearest < starts + keys) & (furthest > starts)

        # The library annotates this field as a numpy array.
        intervals: Any = begin << 16 | end

        def mask(axis: int) -> MaskInfo:
            """The mask of all heads: which blocks to run, and which block along `axis` to fetch for each."""
            fetched = jnp.where(touched, lax.broadcasted_iota(jnp.int32, touched.shape, axis), 0)
            return MaskInfo(
                data_next=fetched[None],
                mask_next=None,
                block_mask=touched.astype(jnp.int32)[None],
                partial_mask_blocks=None,
                q_sequence=intervals,
            )

        segments = _library().SegmentIds(jnp.ones_like(begin), real)
        return cls(_heads(q, queries), k, v, segments, mask(1), mask(0), queries, keys)

    def heads(self, x: Array) -> Array:
        return _heads(x, self.queries)

    def options(self) -> dict[str, Any]:
        library, sizes = _library(), (self.queries, self.keys, self.keys)
        return {
            "block_sizes": library.BlockSizes(*sizes, *sizes, self.queries, self.keys),
            "mask_value": library.DEFAULT_MASK_VALUE,
            "mask_function": _inside,
            "attn_logits_soft_cap": None,
            "residual_checkpoint_name": None,
        }


def _library() -> Any:
    # Imported here: Pallas imports slowly, and most programs have no attention in tiles.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    return splash_attention_kernel


def _inside(query: Array, slot: Array) -> Array:
    return (slot >= (query >> 16) & 0xFFFF) & (slot < query & 0xFFFF)


def _block(length: int) -> int:
    return min(-(-length // _LANES) * _LANES, _LARGEST_BLOCK)


def _pad(x: Array, block: int, axis: int) -> Array:
    """Zeros at the end, up to whole blocks."""
    return jnp.pad(x, [(0, -x.shape[at] % block if at == axis else 0) for at in range(x.ndim)])


def _heads(x: Array, queries: int) -> Array:
    """All query heads in one dimension, each with whole blocks of queries."""
    return _pad(x.reshape(-1, *x.shape[2:]), queries, 1)


def _restored(x: Array, q: Array) -> Array:
    """The inverse of `_heads`."""
    return x[:, : q.shape[2]].reshape(*q.shape[:3], *x.shape[2:])
