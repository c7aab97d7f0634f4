"""Keys and values of the tokens that were already read, in buffers of a fixed size."""

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt16

from .precision import from_bits, to_bits


if TYPE_CHECKING:
    from ..config import MistralConfig


class LayerCache(eqx.Module):
    """The keys and values of one layer.

    `kv_seq` comes after `kv_heads`, so that attention reads each head's keys as one block of memory.

    **Attributes:**

    - `k_buffer`, `v_buffer`: keys and values, or the bits of 16-bit ones, which is how XLA on CPU can replace one
        slot without rewriting all of them.
    - `dtype`: the precision of keys and values.
    """

    k_buffer: Float[Array, "batch kv_heads kv_seq head_dim"] | UInt16[Array, "batch kv_heads kv_seq head_dim"]
    v_buffer: Float[Array, "batch kv_heads kv_seq head_dim"] | UInt16[Array, "batch kv_heads kv_seq head_dim"]
    dtype: jnp.dtype = eqx.field(static=True)

    @property
    def k(self) -> Float[Array, "batch kv_heads kv_seq head_dim"]:
        """The keys, as floats."""
        return from_bits(self.k_buffer, self.dtype)

    @property
    def v(self) -> Float[Array, "batch kv_heads kv_seq head_dim"]:
        """The values, as floats."""
        return from_bits(self.v_buffer, self.dtype)

    def update(
        self,
        k: Float[Array, "batch kv_heads seq head_dim"],
        v: Float[Array, "batch kv_heads seq head_dim"],
        slot: Int[Array, ""],
    ) -> "LayerCache":
        """Writes new keys and values at `slot` and the slots after it."""
        bits = self.k_buffer.dtype == jnp.uint16
        return LayerCache(
            lax.dynamic_update_slice_in_dim(self.k_buffer, to_bits(k) if bits else k, slot, axis=2),
            lax.dynamic_update_slice_in_dim(self.v_buffer, to_bits(v) if bits else v, slot, axis=2),
            self.dtype,
        )

    def grow(self, slots: int) -> "LayerCache":
        """A copy with `slots` more slots."""
        more = ((0, 0), (0, 0), (0, slots), (0, 0))
        return LayerCache(jnp.pad(self.k_buffer, more), jnp.pad(self.v_buffer, more), self.dtype)


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
    def init(
        cls,
        config: "MistralConfig",
        batch: int,
        kv_seq: int,
        dtype: DTypeLike = jnp.float32,
        *,
        platform: str | None = None,
    ) -> "Cache":
        """An empty cache.

        **Arguments:**

        - `config`: the model's.
        - `batch`: rows.
        - `kv_seq`: slots in each row.
        - `dtype`: of keys and values; the model's.
        - `platform`: where the cache will be, such as `"cpu"` or `"tpu"`; JAX's default backend unless given. On a
            CPU 16-bit floats are held as their bits.
        """
        dtype = jnp.dtype(dtype)
        bits = dtype.itemsize == 2 and (platform or jax.default_backend()) == "cpu"
        shape, stored = (batch, config.kv_heads, kv_seq, config.head_dim), jnp.uint16 if bits else dtype
        return cls(
            # No two buffers may be one: each is donated to the loop that updates it.
            tuple(LayerCache(jnp.zeros(shape, stored), jnp.zeros(shape, stored), dtype) for _ in range(config.layers)),
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
        return Cache(
            tuple(layer.grow(more) for layer in self.layers),
            jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=-1),
            self.used,
        )

    def keep(self, length: Int[Array, ""] | int) -> "Cache":
        """The cache without the tokens at position `length` and after it; their slots are not used again."""
        return Cache(self.layers, jnp.where(self.positions < length, self.positions, -1), self.used)
