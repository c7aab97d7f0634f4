"""The KV cache: keys and values of earlier tokens, in buffers of a fixed size."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt16

from ..config import MistralConfig
from ..errors import InputError
from .context import Context
from .precision import from_bits, to_bits
from .slots import window_slots


New = Float[Array, "batch kv_heads own head_dim"]
"""New keys or values of the tokens that this device stores in one forward pass."""

Buffer = Float[Array, "batch kv_heads kv_seq head_dim"] | UInt16[Array, "batch kv_heads kv_seq head_dim"]
"""Keys or values in slots. On CPU, 16-bit floats are stored as their bits: XLA can then update one slot in place.

`kv_seq` comes after `kv_heads`, so that attention reads each head's keys as one block of memory.
"""


class AbstractLayerCache(eqx.Module):
    """The keys and values of one layer."""

    k_buffer: eqx.AbstractVar[Buffer]
    v_buffer: eqx.AbstractVar[Buffer]
    dtype: eqx.AbstractVar[jnp.dtype]

    @abc.abstractmethod
    def extend(
        self, k: New, v: New, context: Context
    ) -> tuple[
        "AbstractLayerCache",
        Float[Array, "batch kv_heads kv_seq head_dim"],
        Float[Array, "batch kv_heads kv_seq head_dim"],
        Int[Array, "batch kv_seq"],
    ]:
        """Adds the keys and values of a pass, in place where the cache is donated.

        **Returns:** the new cache, and the keys, the values and the mask indices of all its slots.
        """

    @abc.abstractmethod
    def grow(self, kv_seq: int) -> "AbstractLayerCache":
        """A copy with room for `kv_seq` tokens."""

    @property
    def slots(self) -> int:
        """The number of slots."""
        return self.k_buffer.shape[2]

    @property
    def k(self) -> Float[Array, "batch kv_heads kv_seq head_dim"]:
        """The keys, as floats."""
        return from_bits(self.k_buffer, self.dtype)

    @property
    def v(self) -> Float[Array, "batch kv_heads kv_seq head_dim"]:
        """The values, as floats."""
        return from_bits(self.v_buffer, self.dtype)


class FullCache(AbstractLayerCache):
    """A cache with one slot for each token.

    **Attributes:**

    - `k_buffer`, `v_buffer`: keys and values.
    - `dtype`: the precision of keys and values.
    """

    k_buffer: Buffer
    v_buffer: Buffer
    dtype: jnp.dtype = eqx.field(static=True)

    def extend(self, k: New, v: New, context: Context) -> tuple["FullCache", Array, Array, Array]:
        def written(buffer: Array, new: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(buffer, _as_in(buffer, new), context.own_slot, axis=2)

        cache = FullCache(written(self.k_buffer, k), written(self.v_buffer, v), self.dtype)
        return cache, cache.k, cache.v, context.key_index

    def grow(self, kv_seq: int) -> "FullCache":
        return FullCache(_padded(self.k_buffer, kv_seq), _padded(self.v_buffer, kv_seq), self.dtype)


class WindowCache(AbstractLayerCache):
    """Keeps the tokens within a window: after the last slot, each new token overwrites the oldest.

    **Attributes:**

    - `k_buffer`, `v_buffer`: keys and values.
    - `dtype`: the precision of keys and values.
    - `limit`: the largest number of slots on one device.
    """

    k_buffer: Buffer
    v_buffer: Buffer
    dtype: jnp.dtype = eqx.field(static=True)
    limit: int = eqx.field(static=True)

    def extend(self, k: New, v: New, context: Context) -> tuple["WindowCache", Array, Array, Array]:
        k_buffer, v_buffer = (
            self._write(buffer, _as_in(buffer, new), context.own_slot)
            for buffer, new in ((self.k_buffer, k), (self.v_buffer, v))
        )
        cache = WindowCache(k_buffer, v_buffer, self.dtype, self.limit)
        return cache, cache.k, cache.v, self._newest(context.key_index, context.own_used)

    def grow(self, kv_seq: int) -> "WindowCache":
        slots = min(kv_seq, self.limit)
        return WindowCache(_padded(self.k_buffer, slots), _padded(self.v_buffer, slots), self.dtype, self.limit)

    def _write(self, buffer: Array, new: Array, slot: Array) -> Array:
        if new.shape[2] == 1:
            return lax.dynamic_update_slice_in_dim(buffer, new, slot % self.slots, axis=2)
        slots = (slot + jnp.arange(new.shape[2], dtype=slot.dtype)) % self.slots
        return buffer.at[:, :, slots].set(new, unique_indices=True)

    def _newest(self, key_index: Int[Array, "batch kv_seq"], used: Int[Array, ""]) -> Int[Array, "batch slots"]:
        """The mask index of the key in each slot; `key_index` has those of all tokens, in order of arrival."""
        if self.slots == key_index.shape[1]:
            return key_index
        newest = used - 1
        token = newest - (newest - jnp.arange(self.slots, dtype=jnp.int32)) % self.slots
        return jnp.where(token >= 0, jnp.take(key_index, jnp.maximum(token, 0), axis=1), -1)


def _as_in(buffer: Array, new: Array) -> Array:
    return to_bits(new) if buffer.dtype == jnp.uint16 else new


def _padded(buffer: Array, slots: int) -> Array:
    return jnp.pad(buffer, ((0, 0), (0, 0), (0, slots - buffer.shape[2]), (0, 0)))


class Cache(eqx.Module):
    """The key/value cache of a model.

    Each slot has the position of its token in the row's sequence, and the mask depends on that position alone. So
    padding may be anywhere in a row: it is a slot with position -1.

    **Attributes:**

    - `layers`: one cache for each layer, so that each is updated in place.
    - `positions`: the position of the token in each slot, -1 in a slot without a token, shape `(batch, kv_seq)`.
    - `used`: the first free slot.
    """

    layers: tuple[AbstractLayerCache, ...]
    positions: Int[Array, "batch kv_seq"]
    used: Int[Array, ""]

    @classmethod
    def init(
        cls,
        config: MistralConfig,
        batch: int,
        kv_seq: int,
        dtype: DTypeLike = jnp.float32,
        *,
        platform: str | None = None,
        chunk: int | None = None,
        num_shards: int = 1,
    ) -> "Cache":
        """An empty cache.

        **Arguments:**

        - `config`: the model's config.
        - `batch`: the number of rows.
        - `kv_seq`: the number of slots in each row.
        - `dtype`: the precision of keys and values, that of the model.
        - `platform`: the platform of the cache, such as `"cpu"` or `"tpu"`; JAX's default backend unless given. On
            CPU, 16-bit floats are stored as their bits.
        - `chunk`: the largest number of tokens in one forward pass. If given, each layer with a window gets a
            [`mistral_eqx.nn.WindowCache`][], and rows may have padding only before their sequence.
        - `num_shards`: the number of devices over which `kv_seq` is going to be split.
        """
        dtype = jnp.dtype(dtype)
        bits = dtype.itemsize == 2 and (platform or jax.default_backend()) == "cpu"
        stored = jnp.uint16 if bits else dtype

        def layer(window: int | None) -> AbstractLayerCache:
            limit = None if window is None or chunk is None else window_slots(window, chunk, num_shards)
            slots = kv_seq if limit is None else min(kv_seq, limit * num_shards)
            shape = batch, config.kv_heads, slots, config.head_dim
            # Two arrays, not one twice: both are donated to the loop that updates them.
            k, v = jnp.zeros(shape, stored), jnp.zeros(shape, stored)
            return FullCache(k, v, dtype) if limit is None else WindowCache(k, v, dtype, limit)

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
