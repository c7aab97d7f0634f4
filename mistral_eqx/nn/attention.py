"""Grouped-query attention."""

import functools

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..parallel import SINGLE, Strategy, pmax, psum, psum_together
from .cache import AbstractLayerCache
from .context import Context
from .kernels import Codes, attention, flash_attention
from .linear import Linear, project
from .mask import attention_mask


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
        x: Float[Array, "batch seq embed"],
        context: Context,
        cache: AbstractLayerCache | None = None,
    ) -> tuple[Float[Array, "batch tokens embed"], AbstractLayerCache | None]:
        """Mixes values over positions.

        **Arguments:**

        - `x`: activations, shape `(batch, seq, embed)`.
        - `context`: what all layers share in this forward pass.
        - `cache`: the keys and values of earlier tokens; without a cache, the keys and values are those of `x`.

        **Returns:** an array like `x`, and the cache with the new keys and values.
        """
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj))
        q = context.query_rotation(q)
        k = context.own(jnp.swapaxes(context.key_rotation(k), 1, 2))
        v = context.own(jnp.swapaxes(v, 1, 2))
        key_index, codes = context.key_index, None
        if cache is not None:
            cache, k, v, key_index = cache.extend(k, v, context)
            codes = cache.codes
        inputs = q, k, v, *context.bounds(self.window), key_index
        # Where `head_dim` is split, scores are partial sums; a tile has no psum.
        tiled = q.shape[1] * k.shape[2] > _WHOLE and context.mask is None and not self.strategy.axes("head_dim")
        mixed, log_sum = self._in_tiles(*inputs) if tiled else self._whole(*inputs, context.mask, codes)
        if self.strategy.axes("kv_seq"):
            weight = jnp.exp(log_sum - pmax(log_sum, "kv_seq", self.strategy))
            mixed, total = psum_together(mixed * weight, weight, "kv_seq", self.strategy)
            mixed = mixed / total
        return self.o_proj(mixed.astype(x.dtype)), cache

    def _whole(
        self,
        q: Array,
        k: Array,
        v: Array,
        first: Array,
        last: Array,
        key_index: Array,
        mask: Array | None,
        codes: Codes | None,
    ) -> tuple[Float[Array, "batch seq kv_heads q_per_kv head_dim"], Float[Array, "batch seq kv_heads q_per_kv 1"]]:
        """The softmax-weighted sums of values, and the logarithms of the sums of exponentiated scores."""
        span = attention_mask(first, last, key_index)
        mask = span if mask is None else span & mask
        total = functools.partial(psum, dims="head_dim", strategy=self.strategy)
        total = total if self.strategy.axes("head_dim") else None
        return attention(q, k, v, mask, scale=self.scale, total=total, codes=codes)

    def _in_tiles(
        self, q: Array, k: Array, v: Array, first: Array, last: Array, key_index: Array
    ) -> tuple[Float[Array, "batch seq kv_heads q_per_kv head_dim"], Float[Array, "batch seq kv_heads q_per_kv 1"]]:
        """Like `_whole`, with one tile of scores at a time."""
        q = jnp.transpose(q, (0, 2, 3, 1, 4))
        mixed, log_sum = flash_attention(q, k, v, first, last, key_index, scale=self.scale)
        return jnp.transpose(mixed, (0, 3, 1, 2, 4)), jnp.transpose(log_sum[..., None], (0, 3, 1, 2, 4))
