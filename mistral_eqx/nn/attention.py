"""Grouped-query attention."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..parallel import SINGLE, Strategy, psum
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
    ) -> tuple[Float[Array, "batch seq embed"], LayerCache | None]:
        """Mixes values over positions.

        **Arguments:**

        - `x`: activations, shape `(batch, seq, embed)`.
        - `rotation`: of the positions of `x`.
        - `mask`: which key each query sees, from `visible`.
        - `cache`, `slot`: the keys and values of earlier tokens, and where those of `x` are written; without a cache
            the keys are those of `x`.

        **Returns:** an array like `x`, and the cache with the new keys and values.
        """
        q = rotation(self.q_proj(x))
        k = jnp.swapaxes(rotation(self.k_proj(x)), 1, 2)
        v = jnp.swapaxes(self.v_proj(x), 1, 2)
        if cache is not None:
            cache = cache.update(k, v, slot)
            k, v = cache.k, cache.v
        wide = at_least_float32(x.dtype)
        scores = jnp.einsum("bsgqd,bgtd->bgqst", q, k, preferred_element_type=wide) * self.scale
        scores = psum(scores, "head_dim", self.strategy)
        # A finite number, for a query that is padding sees no key at all.
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        context = jnp.einsum("bgqst,bgtd->bsgqd", weights, v)
        return self.o_proj(context), cache
