"""Attention as two products, which holds the scores of all queries and keys."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..precision import at_least_float32


def contract_head_dim(
    q: Float[Array, "batch seq kv_heads q_per_kv head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    *,
    stored: bool = True,
) -> Float[Array, "batch kv_heads q_per_kv seq kv_seq"]:
    """The score of each query and key.

    **Arguments:**

    - `stored`: whether the keys are in memory as they are; dequantized ones are not.
    """
    batch, seq, kv_heads, q_per_kv, head_dim = q.shape
    queries = jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(batch * kv_heads, q_per_kv * seq, head_dim)
    keys = k.reshape(batch * kv_heads, -1, head_dim)
    if stored and seq == 1 and q.dtype == jnp.float32:
        scores = lax.platform_dependent(queries, keys, cpu=_scores_elementwise, default=_scores_matmul)
    else:
        scores = _scores_matmul(queries, keys)
    return scores.reshape(batch, kv_heads, q_per_kv, seq, -1)


def contract_kv_seq(
    weights: Float[Array, "batch kv_heads q_per_kv seq kv_seq"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    *,
    stored: bool = True,
) -> Float[Array, "batch seq kv_heads q_per_kv head_dim"]:
    """Sums of values, weighted for each query and key; `stored` as for `contract_head_dim`."""
    batch, kv_heads, q_per_kv, seq, kv_seq = weights.shape
    rows = weights.reshape(batch * kv_heads, q_per_kv * seq, kv_seq).astype(v.dtype)
    values = v.reshape(batch * kv_heads, kv_seq, -1)
    if stored and seq == 1 and v.dtype == jnp.float32:
        context = lax.platform_dependent(rows, values, cpu=_context_elementwise, default=_context_matmul)
    else:
        context = _context_matmul(rows, values)
    return jnp.transpose(context.reshape(batch, kv_heads, q_per_kv, seq, -1), (0, 3, 1, 2, 4))


# Batch and heads are one dimension: over two, XLA on CPU compiles the bfloat16 product with values but cannot run it.
# For one float32 query, its matmul copies all keys and values; elementwise products read them in place.
# Dequantized keys and values are a copy already, and the matmul of a copy is faster.


def _scores_matmul(queries: Array, keys: Array) -> Array:
    return jnp.einsum("bqd,bkd->bqk", queries, keys, preferred_element_type=at_least_float32(queries.dtype))


def _scores_elementwise(queries: Array, keys: Array) -> Array:
    return jnp.sum(queries[:, :, None, :] * keys[:, None, :, :], axis=3)


def _context_matmul(weights: Array, values: Array) -> Array:
    return jnp.einsum("bqk,bkd->bqd", weights, values, preferred_element_type=at_least_float32(values.dtype))


def _context_elementwise(weights: Array, values: Array) -> Array:
    return jnp.sum(weights[:, :, :, None] * values[:, None, :, :], axis=2)
