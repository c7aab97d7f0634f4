"""Latent attention, whose cache has one vector for each token."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..config import Latent
from ..parallel import SINGLE, Strategy
from .attention import attend, over_shards
from .cache import AbstractLayerCache
from .context import Context
from .linear import Linear, project
from .norm import RMSNorm
from .precision import at_least_float32


class LatentAttention(eqx.Module):
    """Attention whose keys and values are linear maps of a latent, one short vector for each token
    ([DeepSeek-V2](https://arxiv.org/abs/2405.04434)).

    A key of a head has `nope_dim` entries from the latent, and `rope_dim` entries with a rotary embedding that all
    heads share. Attention is computed in one of two equal forms, the one with fewer operations
    ([`operations`][mistral_eqx.nn.operations]):

    - expanded: each head computes its keys and values from the latents, as in a prefill;
    - absorbed: each head maps its queries to latents and compares them with the latents, as in decoding.

    **Attributes:**

    - `q_a_proj`, `q_a_norm`, `q_b_proj`: `embed` to `q_rank`, its norm, and `q_rank` to `kv_heads head_dim`, of which
        the last `rope_dim` entries are rotated.
    - `kv_a_proj`: `embed` to `cached`, the `kv_rank` entries of the latent and the `rope_dim` shared entries of keys.
    - `kv_a_norm`, `kv_b_proj`: the norm of the latent, and `kv_rank` to `kv_heads expanded`, the `nope_dim` entries of
        a key and the `value_dim` entries of a value.
    - `o_proj`: `kv_heads value_dim` to `embed`.
    - `latent`: the sizes.
    - `scale`: the factor of the scores.
    - `strategy`: which dimensions are split over which mesh axes. Of the heads each device has its own; every device
        has the latents of all heads.
    """

    q_a_proj: Linear
    q_a_norm: RMSNorm
    q_b_proj: Linear
    kv_a_proj: Linear
    kv_a_norm: RMSNorm
    kv_b_proj: Linear
    o_proj: Linear
    latent: Latent = eqx.field(static=True)
    scale: float = eqx.field(static=True)
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
        - `cache`: the latents and shared keys of earlier tokens; without a cache, those of `x` alone.

        **Returns:** an array like `x`, and the cache with the new latents and shared keys.
        """
        low, compressed = project(x, (self.q_a_proj, self.kv_a_proj))
        q = self.q_b_proj(self.q_a_norm(low))
        nope, rope = jnp.split(q, [self.latent.nope_dim], axis=-1)
        if context.query_scale is not None:
            nope = (nope * context.query_scale[:, :, None, None]).astype(q.dtype)
        rope = context.query_rotation(rope)
        latent, shared = jnp.split(compressed, [self.latent.kv_rank], axis=-1)
        tokens = jnp.concatenate([self.kv_a_norm(latent), context.key_rotation(shared)], axis=-1)
        tokens, key_index, codes = context.own(tokens[:, None]), context.key_index, None
        if cache is not None:
            cache, tokens, _, key_index = cache.extend(tokens, tokens, context)
            codes = cache.codes
        counts = q.shape[1], tokens.shape[2], self.latent
        if operations(*counts, absorbed=True) < operations(*counts, absorbed=False):
            # One key/value head, the token itself; the shared entries of a value have no use.
            maps = self.kv_b_proj.weight.dense()
            of_keys, of_values = jnp.split(maps, [self.latent.nope_dim], axis=1)
            q = jnp.concatenate([_contract("bshn,hnr->bshr", nope, of_keys).astype(q.dtype), rope], axis=-1)
            mixed, log_sum = attend(
                q[:, :, None],
                tokens,
                tokens,
                key_index,
                context,
                codes,
                scale=self.scale,
                window=None,
                strategy=self.strategy,
            )
            mixed, log_sum = mixed[:, :, 0, :, : self.latent.kv_rank], log_sum[:, :, 0]
            mixed = _contract("bshr,hvr->bshv", mixed.astype(x.dtype), of_values)
        else:
            k, v = self._keys_and_values(tokens[:, 0])
            q, k, v = _as_wide(jnp.concatenate([nope, rope], axis=-1)[:, :, :, None], k, v)
            mixed, log_sum = attend(
                q, k, v, key_index, context, None, scale=self.scale, window=None, strategy=self.strategy
            )
            mixed, log_sum = mixed[:, :, :, 0, : self.latent.value_dim], log_sum[:, :, :, 0]
        return self.o_proj(over_shards(mixed, log_sum, self.strategy).astype(x.dtype)), cache

    def _keys_and_values(
        self, tokens: Float[Array, "batch kv_seq cached"]
    ) -> tuple[Float[Array, "batch kv_heads kv_seq head_dim"], Float[Array, "batch kv_heads kv_seq value_dim"]]:
        latent, shared = jnp.split(tokens, [self.latent.kv_rank], axis=-1)
        nope, v = jnp.split(jnp.swapaxes(self.kv_b_proj(latent), 1, 2), [self.latent.nope_dim], axis=-1)
        shared = jnp.broadcast_to(shared[:, None], (*nope.shape[:-1], shared.shape[-1]))
        return jnp.concatenate([nope, shared], axis=-1), v


def operations(queries: int, keys: int, latent: Latent, *, absorbed: bool) -> int:
    """The multiplications of a head in one row of latent attention, beside the projections that both forms have.

    **Arguments:**

    - `queries`, `keys`: how many there are.
    - `latent`: the sizes.
    - `absorbed`: whether queries are compared with latents, and not latents expanded to keys and values.
    """
    maps = latent.kv_rank * latent.expanded
    if absorbed:
        return queries * maps + queries * keys * 2 * latent.cached
    width = max(latent.nope_dim + latent.rope_dim, latent.value_dim)
    return keys * maps + queries * keys * 2 * width


def _contract(dims: str, x: Array, maps: Array) -> Array:
    return jnp.einsum(dims, x, maps, preferred_element_type=at_least_float32(x.dtype))


def _as_wide(*arrays: Array) -> list[Array]:
    """The arrays with zeros after their last entries, so that all are as wide as the widest."""
    width = max(x.shape[-1] for x in arrays)
    return [jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, width - x.shape[-1])]) for x in arrays]
