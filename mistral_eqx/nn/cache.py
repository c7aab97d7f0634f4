"""Keys and values of the tokens that were already read, in buffers of a fixed size."""

from typing import TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


if TYPE_CHECKING:
    from ..config import MistralConfig


class LayerCache(eqx.Module):
    """The keys and values of one layer.

    `kv_seq` comes after `kv_heads`, so that attention reads each head's keys as one block of memory.
    """

    k: Float[Array, "batch kv_heads kv_seq head_dim"]
    v: Float[Array, "batch kv_heads kv_seq head_dim"]

    def update(
        self,
        k: Float[Array, "batch kv_heads seq head_dim"],
        v: Float[Array, "batch kv_heads seq head_dim"],
        slot: Int[Array, ""],
    ) -> "LayerCache":
        """Writes new keys and values at `slot` and the slots after it."""
        return LayerCache(
            lax.dynamic_update_slice_in_dim(self.k, k, slot, axis=2),
            lax.dynamic_update_slice_in_dim(self.v, v, slot, axis=2),
        )


class Cache(eqx.Module):
    """The key/value cache of a model.

    A slot says which position its token has in its row's text. Attention sees a slot by that position alone, so
    that padding, on either side and anywhere between, is a slot with position -1 and needs no further care.

    **Attributes:**

    - `layers`: one entry a layer, so that each is updated in place.
    - `positions`: the position of the token in each slot, -1 where there is none, shape `(batch, kv_seq)`.
    - `used`: the first free slot.
    """

    layers: tuple[LayerCache, ...]
    positions: Int[Array, "batch kv_seq"]
    used: Int[Array, ""]

    @classmethod
    def init(cls, config: "MistralConfig", batch: int, kv_seq: int, dtype: DTypeLike = jnp.float32) -> "Cache":
        """An empty cache.

        **Arguments:**

        - `config`: the model's.
        - `batch`: rows.
        - `kv_seq`: slots in each row.
        - `dtype`: of keys and values; the model's.
        """
        shape = (batch, config.kv_heads, kv_seq, config.head_dim)
        return cls(
            # No two buffers may be one: each is donated to the loop that updates it.
            tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)),
            jnp.full((batch, kv_seq), -1, jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    @property
    def kv_seq(self) -> int:
        """The number of slots in each row."""
        return self.positions.shape[1]

    @property
    def next_positions(self) -> Int[Array, " batch"]:
        """The position after each row's last token; 0 in an empty row."""
        return jnp.max(self.positions, axis=1) + 1

    def grow(self, kv_seq: int) -> "Cache":
        """A copy with `kv_seq` slots, at least as many as there are."""
        more = kv_seq - self.kv_seq
        if more < 0:
            raise ValueError(f"A cache of {self.kv_seq} slots cannot grow to {kv_seq}; ask for at least as many.")
        slots = ((0, 0), (0, 0), (0, more), (0, 0))
        return Cache(
            tuple(LayerCache(jnp.pad(layer.k, slots), jnp.pad(layer.v, slots)) for layer in self.layers),
            jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=-1),
            self.used,
        )

    def keep(self, length: Int[Array, ""] | int) -> "Cache":
        """The cache without the tokens at position `length` and after it; their slots are not used again."""
        return Cache(self.layers, jnp.where(self.positions < length, self.positions, -1), self.used)
