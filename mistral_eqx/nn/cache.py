"""Keys and values of the tokens that were already read, in buffers of a fixed size."""

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt16

from ..errors import InputError
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
    - `limit`: the most slots that it grows to on one device; past them each token takes the slot of the oldest.
        `None` where it has as many as the cache.
    """

    k_buffer: Float[Array, "batch kv_heads kv_seq head_dim"] | UInt16[Array, "batch kv_heads kv_seq head_dim"]
    v_buffer: Float[Array, "batch kv_heads kv_seq head_dim"] | UInt16[Array, "batch kv_heads kv_seq head_dim"]
    dtype: jnp.dtype = eqx.field(static=True)
    limit: int | None = eqx.field(static=True, default=None)

    @property
    def slots(self) -> int:
        """How many there are."""
        return self.k_buffer.shape[2]

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
        """Writes new keys and values at `slot` and the slots after it; past the last comes the first."""
        if self.k_buffer.dtype == jnp.uint16:
            k, v = to_bits(k), to_bits(v)
        k_buffer, v_buffer = (self._write(*pair, slot) for pair in ((self.k_buffer, k), (self.v_buffer, v)))
        return LayerCache(k_buffer, v_buffer, self.dtype, self.limit)

    def _write(self, buffer: Array, new: Array, slot: Array) -> Array:
        if self.limit is None:
            return lax.dynamic_update_slice_in_dim(buffer, new, slot, axis=2)
        if new.shape[2] == 1:
            return lax.dynamic_update_slice_in_dim(buffer, new, slot % self.slots, axis=2)
        slots = (slot + jnp.arange(new.shape[2], dtype=slot.dtype)) % self.slots
        return buffer.at[:, :, slots].set(new, unique_indices=True)

    def positions(self, positions: Int[Array, "batch kv_seq"], used: Int[Array, ""]) -> Int[Array, "batch slots"]:
        """Where the token in each slot stands, out of what the whole cache knows.

        **Arguments:**

        - `positions`: of all tokens, in the order in which they came.
        - `used`: how many there are, on this device.
        """
        if self.slots == positions.shape[1]:
            return positions
        newest = used - 1
        place = newest - (newest - jnp.arange(self.slots, dtype=jnp.int32)) % self.slots
        return jnp.where(place >= 0, jnp.take(positions, jnp.maximum(place, 0), axis=1), -1)

    def grow(self, kv_seq: int) -> "LayerCache":
        """A copy with `kv_seq` slots, or as many as it may have."""
        slots = kv_seq if self.limit is None else min(kv_seq, self.limit)
        more = ((0, 0), (0, 0), (0, slots - self.slots), (0, 0))
        return LayerCache(jnp.pad(self.k_buffer, more), jnp.pad(self.v_buffer, more), self.dtype, self.limit)


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
        piece: int | None = None,
        shares: int = 1,
    ) -> "Cache":
        """An empty cache.

        **Arguments:**

        - `config`: the model's.
        - `batch`: rows.
        - `kv_seq`: slots in each row.
        - `dtype`: of keys and values; the model's.
        - `platform`: where the cache will be, such as `"cpu"` or `"tpu"`; JAX's default backend unless given. On a
            CPU 16-bit floats are held as their bits.
        - `piece`: the most tokens that are ever read at a time. With it, layers with a window keep what a window
            reaches and no more, whatever `kv_seq`: for rows whose only padding is before their text.
        - `shares`: over how many devices `kv_seq` is going to be split.
        """
        dtype = jnp.dtype(dtype)
        bits = dtype.itemsize == 2 and (platform or jax.default_backend()) == "cpu"
        stored = jnp.uint16 if bits else dtype

        def layer(window: int | None) -> LayerCache:
            # The first of a piece sees a whole window, while the last has been written already. And a device may
            # touch one slot for a token that is another's.
            limit = None if window is None or piece is None else -(-(window + piece) // shares) + 2
            slots = kv_seq if limit is None else min(kv_seq, limit * shares)
            shape = batch, config.kv_heads, slots, config.head_dim
            # No two buffers may be one: each is donated to the loop that updates it.
            return LayerCache(jnp.zeros(shape, stored), jnp.zeros(shape, stored), dtype, limit)

        return cls(
            tuple(layer(window) for window in config.windows),
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
            raise InputError(f"A cache of {self.kv_seq} slots cannot grow to {kv_seq}; ask for at least as many.")
        return Cache(
            tuple(layer.grow(kv_seq) for layer in self.layers),
            jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=-1),
            self.used,
        )

    def keep(self, length: Int[Array, ""] | int) -> "Cache":
        """The cache without the tokens at position `length` and after it; their slots are not used again."""
        return Cache(self.layers, jnp.where(self.positions < length, self.positions, -1), self.used)
