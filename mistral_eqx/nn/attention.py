"""Grouped-query attention."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..parallel import SINGLE, Strategy, own_slot, own_slots, pmax, psum, psum_together
from .cache import LayerCache
from .linear import Linear
from .precision import at_least_float32
from .rotary import Rotation


def visible(
    positions: Int[Array, "batch seq"], kv_positions: Int[Array, "batch kv_seq"], window: int | None
) -> Bool[Array, "batch seq kv_seq"]:
    """Which keys each query sees: those before it and itself, inside the window.

    **Arguments:**

    - `positions`: the position of each query.
    - `kv_positions`: the position of each key; a negative one is padding and is never seen.
    - `window`: how many positions a query sees, itself included, or `None` for all.
    """
    distance = positions[:, :, None] - kv_positions[:, None, :]
    seen = (kv_positions >= 0)[:, None, :] & (distance >= 0)
    return seen if window is None else seen & (distance < window)


class Attention(eqx.Module):
    """Causal attention in which `q_per_kv` query heads share each key/value head
    ([GQA](https://arxiv.org/abs/2305.13245)).

    Takes O(seq x kv_seq x kv_heads x q_per_kv x head_dim) operations a row, and memory for one score a query,
    key and query head.

    **Attributes:**

    - `q_proj`: `embed` to `kv_heads q_per_kv head_dim`.
    - `k_proj`, `v_proj`: `embed` to `kv_heads head_dim`.
    - `o_proj`: `kv_heads q_per_kv head_dim` to `embed`.
    - `scale`: the factor of the scores, one over the root of the whole `head_dim`, also where that is split.
    - `window`: how many positions a query sees, itself included, or `None` for all before it.
    - `strategy`: which dimensions are split over which mesh axes.
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    scale: float = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    strategy: Strategy = SINGLE

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        rotation: Rotation,
        mask: Bool[Array, "batch seq kv_seq"],
        cache: LayerCache | None,
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "batch tokens embed"], LayerCache | None]:
        """Mixes values over positions.

        **Arguments:**

        - `x`: activations, shape `(batch, seq, embed)`.
        - `rotation`: of the positions of `x`.
        - `mask`: which key each query sees, from `visible`.
        - `cache`, `slot`: the keys and values of earlier tokens, and the slot of the first of `x`; without a cache
            the keys are those of `x`.

        **Returns:** an array like `x`, and the cache with the new keys and values.
        """
        q = rotation(self.q_proj(x))
        k = own_slots(jnp.swapaxes(rotation(self.k_proj(x)), 1, 2), slot, self.strategy, axis=2)
        v = own_slots(jnp.swapaxes(self.v_proj(x), 1, 2), slot, self.strategy, axis=2)
        if cache is not None:
            cache = cache.update(k, v, own_slot(slot, self.strategy))
            k, v = cache.k, cache.v
        scores = psum(_contract_head_dim(q, k), "head_dim", self.strategy) * self.scale
        # A finite number, for a query that is padding sees no key at all.
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
        # The softmax is divided by its sum last, so that devices with different keys can add both up before.
        largest = pmax(lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)), "kv_seq", self.strategy)
        weights = jnp.exp(scores - largest)
        total = jnp.transpose(jnp.sum(weights, axis=-1, keepdims=True), (0, 3, 1, 2, 4))
        context, total = psum_together(_contract_kv_seq(weights, v), total, "kv_seq", self.strategy)
        return self.o_proj((context / total).astype(x.dtype)), cache


def _contract_head_dim(
    q: Float[Array, "batch seq kv_heads q_per_kv head_dim"], k: Float[Array, "batch kv_heads kv_seq head_dim"]
) -> Float[Array, "batch kv_heads q_per_kv seq kv_seq"]:
    batch, seq, kv_heads, q_per_kv, head_dim = q.shape
    queries = jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(batch * kv_heads, q_per_kv * seq, head_dim)
    keys = k.reshape(batch * kv_heads, -1, head_dim)
    if seq == 1 and q.dtype == jnp.float32:
        scores = lax.platform_dependent(queries, keys, cpu=_scores_elementwise, default=_scores_matmul)
    else:
        scores = _scores_matmul(queries, keys)
    return scores.reshape(batch, kv_heads, q_per_kv, seq, -1)


def _contract_kv_seq(
    weights: Float[Array, "batch kv_heads q_per_kv seq kv_seq"], v: Float[Array, "batch kv_heads kv_seq head_dim"]
) -> Float[Array, "batch seq kv_heads q_per_kv head_dim"]:
    batch, kv_heads, q_per_kv, seq, kv_seq = weights.shape
    rows = weights.reshape(batch * kv_heads, q_per_kv * seq, kv_seq).astype(v.dtype)
    values = v.reshape(batch * kv_heads, kv_seq, -1)
    if seq == 1 and v.dtype == jnp.float32:
        context = lax.platform_dependent(rows, values, cpu=_context_elementwise, default=_context_matmul)
    else:
        context = _context_matmul(rows, values)
    return jnp.transpose(context.reshape(batch, kv_heads, q_per_kv, seq, -1), (0, 3, 1, 2, 4))


# Batch and heads are one dimension here: over two of them XLA on CPU compiles the bfloat16 product with the values and
# then refuses to run it. For a single query it also copies all keys and values before a float32 product; multiplied
# entry by entry they are read in place.


def _scores_matmul(queries: Array, keys: Array) -> Array:
    return jnp.einsum("bqd,bkd->bqk", queries, keys, preferred_element_type=at_least_float32(queries.dtype))


def _scores_elementwise(queries: Array, keys: Array) -> Array:
    return jnp.sum(queries[:, :, None, :] * keys[:, None, :, :], axis=3)


def _context_matmul(weights: Array, values: Array) -> Array:
    return jnp.einsum("bqk,bkd->bqd", weights, values, preferred_element_type=at_least_float32(values.dtype))


def _context_elementwise(weights: Array, values: Array) -> Array:
    return jnp.sum(weights[:, :, :, None] * values[:, None, :, :], axis=2)
