"""Grouped-query attention."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..parallel import SINGLE, Strategy, psum
from .cache import AbstractLayerCache
from .context import Context
from .kernels import Codes, attention, flash_attention
from .linear import Linear, project
from .mask import attention_mask
from .ring import over_devices


# Above this many scores per head (4 MB of float32), attention runs in tiles.
_WHOLE = 1024 * 1024


class Attention(eqx.Module):
    """Attention in which `q_per_kv` query heads share each key/value head
    ([GQA](https://arxiv.org/abs/2305.13245)).

    Each row takes O(seq x kv_seq x kv_heads x q_per_kv x head_dim) operations. Memory holds one score for each query,
    key and query head, or above a limit one tile of scores at a time ([`mistral_eqx.nn.flash_attention`][]).

    **Attributes:**

    - `q_proj`: `embed` to `kv_heads q_per_kv head_dim`.
    - `k_proj`, `v_proj`: `embed` to `kv_heads head_dim`.
    - `o_proj`: `kv_heads q_per_kv head_dim` to `embed`.
    - `scale`: the factor of the scores, `1 / sqrt(head_dim)` with the `head_dim` of the whole model, also where a
        strategy splits that dimension.
    - `window`: how many positions a query attends to on either side, itself included; `None` for all.
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
        x: Float[Array, "batch own embed"],
        context: Context,
        cache: AbstractLayerCache | None = None,
    ) -> tuple[Float[Array, "batch tokens embed"], AbstractLayerCache | None]:
        """Mixes values over positions.

        **Arguments:**

        - `x`: activations, shape `(batch, seq, embed)`; where `tokens` is split, those of this device.
        - `context`: what all layers share in this forward pass.
        - `cache`: the keys and values of earlier tokens; without a cache, the keys and values are those of `x`.

        **Returns:** an array like `x`, and the cache with the new keys and values.
        """
        # All devices write the same keys and values into a cache, and JAX must know that they are the same.
        to = "varying" if cache is None else "invarying"
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj), context.seq, to=to)
        q = context.query_rotation(q)
        k = context.own(jnp.swapaxes(context.key_rotation(k), 1, 2))
        v = context.own(jnp.swapaxes(v, 1, 2))
        key_index, codes = context.key_index, None
        if cache is not None:
            cache, k, v, key_index = cache.extend(k, v, context)
            codes = None if context.splits_seq else jax.tree.map(context.own_rows, cache.codes)

        def attended(keys: tuple[Array, ...], key_index: Array) -> tuple[Array, Array]:
            k, v = keys
            return attend(
                q, k, v, key_index, context, codes, scale=self.scale, window=self.window, strategy=self.strategy
            )

        mixed = over_devices(attended, (k, v), key_index, context, self.window, self.strategy)
        return self.o_proj(mixed.astype(x.dtype)), cache


def attend(
    q: Float[Array, "batch seq kv_heads q_per_kv head_dim"],
    k: Float[Array, "batch kv_heads kv_seq head_dim"],
    v: Float[Array, "batch kv_heads kv_seq head_dim"],
    key_index: Int[Array, "batch kv_seq"],
    context: Context,
    codes: Codes | None,
    *,
    scale: float,
    window: int | None,
    strategy: Strategy,
) -> tuple[Float[Array, "batch seq kv_heads q_per_kv head_dim"], Float[Array, "batch seq kv_heads q_per_kv 1"]]:
    """The softmax-weighted sums of this device's values, and the logarithms of the sums of exponentiated scores.

    **Arguments:**

    - `q`, `k`, `v`: queries, keys and values.
    - `key_index`: the mask index of each key.
    - `context`: what all layers share in this forward pass.
    - `codes`: the codes of which `k` and `v` are the numbers, if there are such.
    - `scale`, `window`, `strategy`: as for [`mistral_eqx.nn.Attention`][].
    """
    first, last = context.bounds(window)
    # Where `head_dim` is split, scores are partial sums; a tile has no psum.
    if q.shape[1] * k.shape[2] > _WHOLE and context.mask is None and not strategy.axes("head_dim"):
        mixed, log_sum = flash_attention(jnp.transpose(q, (0, 2, 3, 1, 4)), k, v, first, last, key_index, scale=scale)
        return jnp.transpose(mixed, (0, 3, 1, 2, 4)), jnp.transpose(log_sum[..., None], (0, 3, 1, 2, 4))
    mask = attention_mask(first, last, key_index)
    mask = mask if context.mask is None else mask & context.mask
    total = functools.partial(psum, dims="head_dim", strategy=strategy) if strategy.axes("head_dim") else None
    return attention(q, k, v, mask, scale=scale, total=total, codes=codes)
