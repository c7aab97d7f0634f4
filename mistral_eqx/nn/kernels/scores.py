"""Attention as two products, which holds the scores of all queries and keys."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ...parallel import kernel, vary_alike
from ..precision import at_least_float32
from . import native


Codes = tuple[Array, Array, Array, Array]
"""The codes of keys and of values, then the scales of both."""


def attention(
    q: Float[Array, "batch seq kv_heads q_per_kv head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    mask: Bool[Array, "batch seq kv_seq"],
    *,
    scale: float,
    total: Callable[[Array], Array] | None = None,
    codes: Codes | None = None,
) -> tuple[Float[Array, "batch seq kv_heads q_per_kv head_dim"], Float[Array, "batch seq kv_heads q_per_kv 1"]]:
    """Softmax-weighted sums of values.

    On CPU, a C++ kernel does this for few queries. It reads the codes of a quantized cache, and nothing is dequantized.

    **Arguments:**

    - `q`, `k`, `v`: queries, keys and values.
    - `mask`: which keys each query attends to.
    - `scale`: the factor of the scores.
    - `total`: adds up partial scores over devices, where `head_dim` is split.
    - `codes`: the codes of which `k` and `v` are the numbers, if there are such.

    **Returns:** one weighted sum for each query, and the logarithm of the sum of its exponentiated scores. For a query
    that attends to no key, these are finite numbers without meaning.
    """
    by_xla = functools.partial(_by_xla, scale=scale, total=total)
    if (
        total is not None
        or q.shape[1] > native.FEW
        or q.dtype == jnp.float64
        or not native.attends(k.dtype, k.shape[3])
    ):
        return by_xla(q, k, v, mask)
    q, k, v, mask, *both = vary_alike(q, k, v, mask, *(codes or ()))
    return _of_few(q, k, v, mask, tuple(both), scale)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _of_few(q: Array, k: Array, v: Array, mask: Array, codes: tuple[Array, ...], scale: float) -> tuple[Array, Array]:
    def by_kernel(q: Array, k: Array, v: Array, mask: Array, *codes: Array) -> tuple[Array, Array]:
        q = q.astype(jnp.float32)
        if codes:
            k, v, k_scales, v_scales = codes
            return native.attend(q, k, v, mask, (k_scales, v_scales), scale=scale)
        return native.attend(q, k, v, mask, scale=scale)

    def by_xla(q: Array, k: Array, v: Array, mask: Array, *codes: Array) -> tuple[Array, Array]:
        return _by_xla(q, k, v, mask, scale)

    chosen = kernel(lambda *inputs: lax.platform_dependent(*inputs, cpu=by_kernel, default=by_xla))
    return chosen(q, k, v, mask, *codes)


@_of_few.defjvp
def _of_few_jvp(scale: float, primals, tangents):
    *inputs, mask, _ = primals
    return jax.jvp(lambda q, k, v: _by_xla(q, k, v, mask, scale), tuple(inputs), tuple(tangents[:3]))


def _by_xla(
    q: Array, k: Array, v: Array, mask: Array, scale: float, total: Callable[[Array], Array] | None = None
) -> tuple[Array, Array]:
    scores = contract_head_dim(q, k)
    scores = (scores if total is None else total(scores)) * scale
    # A finite number: a padding query attends to no key, and minus infinity would make its weights NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    largest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    summed = jnp.sum(weights, axis=-1, keepdims=True)
    summed, log_sum = (jnp.transpose(x, (0, 3, 1, 2, 4)) for x in (summed, largest + jnp.log(summed)))
    return contract_kv_seq(weights, v) / summed, log_sum


def contract_head_dim(
    q: Float[Array, "batch seq kv_heads q_per_kv head_dim"], k: Float[Array, "batch kv_heads kv_seq head_dim"]
) -> Float[Array, "batch kv_heads q_per_kv seq kv_seq"]:
    """The score of each query and key."""
    batch, seq, kv_heads, q_per_kv, head_dim = q.shape
    queries = jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(batch * kv_heads, q_per_kv * seq, head_dim)
    keys = k.reshape(batch * kv_heads, -1, head_dim)
    if seq == 1 and q.dtype == jnp.float32:
        scores = lax.platform_dependent(queries, keys, cpu=_scores_elementwise, default=_scores_matmul)
    else:
        scores = _scores_matmul(queries, keys)
    return scores.reshape(batch, kv_heads, q_per_kv, seq, -1)


def contract_kv_seq(
    weights: Float[Array, "batch kv_heads q_per_kv seq kv_seq"], v: Float[Array, "batch kv_heads kv_seq head_dim"]
) -> Float[Array, "batch seq kv_heads q_per_kv head_dim"]:
    """Sums of values, weighted for each query and key."""
    batch, kv_heads, q_per_kv, seq, kv_seq = weights.shape
    rows = weights.reshape(batch * kv_heads, q_per_kv * seq, kv_seq).astype(v.dtype)
    values = v.reshape(batch * kv_heads, kv_seq, -1)
    if seq == 1 and v.dtype == jnp.float32:
        context = lax.platform_dependent(rows, values, cpu=_context_elementwise, default=_context_matmul)
    else:
        context = _context_matmul(rows, values)
    return jnp.transpose(context.reshape(batch, kv_heads, q_per_kv, seq, -1), (0, 3, 1, 2, 4))


# Batch and heads are one dimension: over two, XLA on CPU compiles the bfloat16 product with values but cannot run it.
# For one float32 query, its matmul copies all keys and values; elementwise products read them in place.


def _scores_matmul(queries: Array, keys: Array) -> Array:
    return jnp.einsum("bqd,bkd->bqk", queries, keys, preferred_element_type=at_least_float32(queries.dtype))


def _scores_elementwise(queries: Array, keys: Array) -> Array:
    return jnp.sum(queries[:, :, None, :] * keys[:, None, :, :], axis=3)


def _context_matmul(weights: Array, values: Array) -> Array:
    return jnp.einsum("bqk,bkd->bqd", weights, values, preferred_element_type=at_least_float32(values.dtype))


def _context_elementwise(weights: Array, values: Array) -> Array:
    return jnp.sum(weights[:, :, :, None] * values[:, None, :, :], axis=2)
