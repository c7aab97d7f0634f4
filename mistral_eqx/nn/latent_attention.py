"""Latent attention, whose cache has one vector for each token."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..config import Latent
from ..parallel import SINGLE, Strategy
from .attention import attend
from .cache import AbstractLayerCache
from .context import Context
from .kernels import Codes
from .linear import Linear, project
from .norm import RMSNorm
from .precision import at_least_float32
from .ring import over_devices


class LatentAttention(eqx.Module):
    """Attention whose keys and values are linear maps of a latent, one short vector for each token
    ([DeepSeek-V2](https://arxiv.org/abs/2405.04434)).

    A key of a head has `nope_dim` entries from the latent, and `rope_dim` entries with a rotary embedding that all
    heads share. Attention is computed in one of two equal forms, the one with fewer operations
    ([`latent_operations`][mistral_eqx.nn.latent_operations]):

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
    - `window`: how many positions a query attends to on either side, itself included; `None` for all.
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
        - `cache`: the latents and shared keys of earlier tokens; without a cache, those of `x` alone.

        **Returns:** an array like `x`, and the cache with the new latents and shared keys.
        """
        # All devices write the same latents into a cache, and JAX must know that they are the same.
        to = "varying" if cache is None else "invarying"
        low, compressed = project(x, (self.q_a_proj, self.kv_a_proj), context.seq, to=to)
        q = self.q_b_proj(self.q_a_norm(low))
        nope, rope = jnp.split(q, [self.latent.nope_dim], axis=-1)
        if (scale := context.query_scale) is not None:
            nope = (nope.astype(scale.dtype) * scale[:, :, None, None]).astype(q.dtype)
        rope = context.query_rotation(rope)
        latent, shared = jnp.split(compressed, [self.latent.kv_rank], axis=-1)
        tokens = jnp.concatenate([self.kv_a_norm(latent), context.key_rotation(shared)], axis=-1)
        tokens, key_index, codes = context.own(tokens[:, None]), context.key_index, None
        if cache is not None:
            cache, tokens, _, key_index = cache.extend(tokens, tokens, context)
            codes = None if context.splits_seq else jax.tree.map(context.own_rows, cache.codes)

        def attended(keys: tuple[Array, ...], key_index: Array) -> tuple[Array, Array]:
            (tokens,) = keys
            counts = q.shape[1], tokens.shape[2], self.latent
            if latent_operations(*counts, absorbed=True) < latent_operations(*counts, absorbed=False):
                return self._absorbed(nope, rope, tokens, key_index, context, codes)
            return self._expanded(nope, rope, tokens, key_index, context)

        mixed = over_devices(attended, (tokens,), key_index, context, self.window, self.strategy)
        return self.o_proj(mixed.astype(x.dtype)), cache

    def _absorbed(
        self, nope: Array, rope: Array, tokens: Array, key_index: Array, context: Context, codes: Codes | None
    ) -> tuple[Float[Array, "batch seq kv_heads value_dim"], Float[Array, "batch seq kv_heads 1"]]:
        """The weighted sums of values by scores of latents, as of one key/value head whose keys are its values."""
        of_keys, of_values = jnp.split(self.kv_b_proj.weight.dense(), [self.latent.nope_dim], axis=1)
        mapped = _by_head("hxn,hnr->hxr", nope, of_keys).astype(rope.dtype)
        q = jnp.concatenate([mapped, rope], axis=-1)[:, :, None]
        mixed, log_sum = self._attend(q, tokens, tokens, key_index, context, codes)
        latents = mixed[:, :, 0, :, : self.latent.kv_rank].astype(rope.dtype)
        return _by_head("hxr,hvr->hxv", latents, of_values), log_sum[:, :, 0]

    def _expanded(
        self, nope: Array, rope: Array, tokens: Array, key_index: Array, context: Context
    ) -> tuple[Float[Array, "batch seq kv_heads value_dim"], Float[Array, "batch seq kv_heads 1"]]:
        """The weighted sums of values by scores of keys."""
        latent, shared = jnp.split(tokens[:, 0], [self.latent.kv_rank], axis=-1)
        of_keys, v = jnp.split(jnp.swapaxes(self.kv_b_proj(latent), 1, 2), [self.latent.nope_dim], axis=-1)
        shared = jnp.broadcast_to(shared[:, None], (*of_keys.shape[:-1], shared.shape[-1]))
        q = jnp.concatenate([nope, rope], axis=-1)[:, :, :, None]
        q, k, v = _as_wide(q, jnp.concatenate([of_keys, shared], axis=-1), v)
        mixed, log_sum = self._attend(q, k, v, key_index, context, None)
        return mixed[:, :, :, 0, : self.latent.value_dim], log_sum[:, :, :, 0]

    def _attend(
        self, q: Array, k: Array, v: Array, key_index: Array, context: Context, codes: Codes | None
    ) -> tuple[Array, Array]:
        return attend(q, k, v, key_index, context, codes, scale=self.scale, window=self.window, strategy=self.strategy)


def latent_operations(queries: int, keys: int, latent: Latent, *, absorbed: bool) -> int:
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


def _by_head(
    dims: str, x: Float[Array, "batch seq kv_heads _"], maps: Float[Array, "kv_heads _ _"]
) -> Float[Array, "batch seq kv_heads _"]:
    """Applies the map of each head."""
    # Batch and sequence are one dimension: over two, XLA on CPU compiles a bfloat16 product but cannot run it.
    batch, seq, heads, width = x.shape
    rows = jnp.swapaxes(x.reshape(batch * seq, heads, width), 0, 1)
    y = jnp.einsum(dims, rows, maps, preferred_element_type=at_least_float32(x.dtype))
    return jnp.swapaxes(y, 0, 1).reshape(batch, seq, heads, -1)


def _as_wide(*arrays: Array) -> list[Array]:
    """The arrays with zeros after their last entries, so that all are as wide as the widest."""
    width = max(x.shape[-1] for x in arrays)
    return [jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, width - x.shape[-1])]) for x in arrays]
