"""The KV cache: keys and values of earlier tokens, in buffers of a fixed size."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..checks import CacheDType, checked
from ..config import MistralConfig
from ..errors import InputError
from ..parallel import LEADING, AbstractNamed
from .buffer import Buffer
from .context import Context
from .kernels import Codes
from .slots import window_slots


New = Float[Array, "batch kv_heads own head_dim"]
"""New keys or values of the tokens that this device stores in one forward pass."""


class AbstractLayerCache(eqx.Module):
    """The keys and values of one layer."""

    k_buffer: eqx.AbstractVar[Buffer]

    @property
    @abc.abstractmethod
    def values(self) -> Buffer:
        """The buffer of the values, which may be that of the keys."""

    @property
    @abc.abstractmethod
    def forgets(self) -> bool:
        """Whether new tokens overwrite old ones."""

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

        **Returns:** the new cache, and the keys, the values and the mask indices of all its slots. Those of this pass
        are as they are stored, rounded where the cache is quantized: attention then never depends on chunks.
        """

    @abc.abstractmethod
    def grow(self, kv_seq: int) -> "AbstractLayerCache":
        """A copy with room for `kv_seq` tokens."""

    def written(
        self, k: New, v: New, write: Callable[[Array, Array], Array], context: Context
    ) -> tuple[Buffer, Buffer]:
        """The buffers with new keys and values, of which `write(x, new)` puts each array `new` into `x`."""
        buffers = (self.k_buffer, k), (self.values, v)
        k_buffer, v_buffer = (jax.tree.map(write, x, x.like(new, context.strategy)) for x, new in buffers)
        return k_buffer, v_buffer

    @property
    def slots(self) -> int:
        """The number of slots."""
        return self.k_buffer.slots

    @property
    def k(self) -> Float[Array, "batch kv_heads kv_seq head_dim"]:
        """The keys, as floats."""
        return self.k_buffer.floats

    @property
    def v(self) -> Float[Array, "batch kv_heads kv_seq head_dim"]:
        """The values, as floats."""
        return self.values.floats

    @property
    def codes(self) -> Codes | None:
        """The codes of keys and values, and their scales; `None` if the cache has floats."""
        k, v = self.k_buffer, self.values
        return None if k.scales is None or v.scales is None else (k.numbers, v.numbers, k.scales, v.scales)


class FullCache(AbstractLayerCache):
    """A cache with one slot for each token.

    **Attributes:**

    - `k_buffer`, `v_buffer`: keys and values.
    """

    k_buffer: Buffer
    v_buffer: Buffer

    @property
    def values(self) -> Buffer:
        return self.v_buffer

    @property
    def forgets(self) -> bool:
        return False

    def extend(self, k: New, v: New, context: Context) -> tuple["FullCache", Array, Array, Array]:
        def write(x: Array, new: Array) -> Array:
            return context.put(x, new, context.own_slot)

        cache = FullCache(*self.written(k, v, write, context))
        own = jax.tree.map(context.own_rows, cache)
        return cache, own.k, own.v, context.key_index

    def grow(self, kv_seq: int) -> "FullCache":
        return FullCache(self.k_buffer.grow(kv_seq), self.v_buffer.grow(kv_seq))


class WindowCache(AbstractLayerCache):
    """Keeps the tokens within a window: after the last slot, each new token overwrites the oldest.

    **Attributes:**

    - `k_buffer`, `v_buffer`: keys and values.
    - `limit`: the largest number of slots on one device.
    """

    k_buffer: Buffer
    v_buffer: Buffer
    limit: int = eqx.field(static=True)

    @property
    def values(self) -> Buffer:
        return self.v_buffer

    @property
    def forgets(self) -> bool:
        return True

    def extend(self, k: New, v: New, context: Context) -> tuple["WindowCache", Array, Array, Array]:
        def write(x: Array, new: Array) -> Array:
            slot, count = context.own_slot, new.shape[2]
            if count == 1:
                return context.put(x, new, slot % self.slots)
            slots = (slot + jnp.arange(count, dtype=slot.dtype)) % self.slots
            return x.at[:, :, slots].set(new, unique_indices=True)

        cache = WindowCache(*self.written(k, v, write, context), self.limit)
        own = jax.tree.map(context.own_rows, cache)
        return cache, own.k, own.v, self._newest(context.key_index, context.own_used)

    def grow(self, kv_seq: int) -> "WindowCache":
        slots = min(kv_seq, self.limit)
        return WindowCache(self.k_buffer.grow(slots), self.v_buffer.grow(slots), self.limit)

    def _newest(self, key_index: Int[Array, "batch kv_seq"], used: Int[Array, ""]) -> Int[Array, "batch slots"]:
        """The mask index of the key in each slot; `key_index` has those of all tokens, in order of arrival."""
        if self.slots == key_index.shape[1]:
            return key_index
        newest = used - 1
        token = newest - (newest - jnp.arange(self.slots, dtype=jnp.int32)) % self.slots
        return jnp.where(token >= 0, jnp.take(key_index, jnp.maximum(token, 0), axis=1), -1)


class LatentCache(AbstractLayerCache, AbstractNamed):
    """A cache with one slot for each token, in which one vector is the key and the value of all heads.

    **Attributes:**

    - `k_buffer`: the latent and the shared entries of the key of each token, as of one head. No strategy splits them
        but along `batch` and `kv_seq`.
    """

    k_buffer: Buffer

    @property
    def values(self) -> Buffer:
        return self.k_buffer

    @property
    def forgets(self) -> bool:
        return False

    def extend(self, k: New, v: New, context: Context) -> tuple["LatentCache", Array, Array, Array]:
        def write(x: Array, new: Array) -> Array:
            return context.put(x, new, context.own_slot)

        cache = LatentCache(jax.tree.map(write, self.k_buffer, self.k_buffer.like(k, context.strategy)))
        own = jax.tree.map(context.own_rows, cache).k
        return cache, own, own, context.key_index

    def grow(self, kv_seq: int) -> "LatentCache":
        return LatentCache(self.k_buffer.grow(kv_seq))

    def array_dims(self) -> dict[str, str]:
        return {"k_buffer.numbers": "batch _ kv_seq _", "k_buffer.scales": "batch _ kv_seq"}


class Cache(eqx.Module):
    """The key/value cache of a model.

    Each slot has the position of its token in the row's sequence, and the mask depends on that position alone. So
    padding may be anywhere in a row: it is a slot with position -1.

    **Attributes:**

    - `layers`: one cache for each layer, so that each is updated in place. Where the strategy splits `layers`, one for
        each layer of a stage: it has the rows of the first stage's layer, then those of the second's, and so on.
    - `positions`: the position of the token in each slot, -1 in a slot without a token, shape `(batch, kv_seq)`.
    - `used`: the first free slot.
    """

    layers: tuple[AbstractLayerCache, ...] = eqx.field(metadata={LEADING: "layers+"})
    positions: Int[Array, "batch kv_seq"]
    used: Int[Array, ""]

    @classmethod
    def init(
        cls,
        config: MistralConfig,
        batch: int,
        kv_seq: int,
        dtype: DTypeLike = jnp.float32,
        cache_dtype: CacheDType | None = None,
        *,
        platform: str | None = None,
        chunk: int | None = None,
        num_shards: int = 1,
        stages: int = 1,
    ) -> "Cache":
        """An empty cache.

        **Arguments:**

        - `config`: the model's config.
        - `batch`: the number of rows.
        - `kv_seq`: the number of slots in each row.
        - `dtype`: the precision of keys and values, that of the model.
        - `cache_dtype`: `"int8"` or `"float8_e4m3"` for keys and values that are rounded to 8 bits, with a scale for
            each token and head; by default they are stored in `dtype`.
        - `platform`: the platform of the cache, such as `"cpu"` or `"tpu"`; JAX's default backend unless given. On
            CPU, 16-bit floats are stored as their bits.
        - `chunk`: the largest number of tokens in one forward pass. If given, each layer with a window gets a
            [`mistral_eqx.nn.WindowCache`][], and rows may have padding only before their sequence.
        - `num_shards`: the number of devices over which `kv_seq` is going to be split.
        - `stages`: the number of devices over which `layers` is going to be split.
        """
        checked(cache_dtype, CacheDType | None, "cache_dtype")

        def layer(window: int | None) -> AbstractLayerCache:
            if (latent := config.latent) is not None:
                shape = stages * batch, 1, kv_seq, latent.cached
                return LatentCache(Buffer.init(shape, dtype, cache_dtype, platform=platform))
            limit = None if window is None or chunk is None else window_slots(window, chunk, num_shards)
            slots = kv_seq if limit is None else min(kv_seq, limit * num_shards)
            shape = stages * batch, config.kv_heads, slots, config.head_dim
            # Two buffers, not one twice: both are donated to the loop that updates them.
            k, v = (Buffer.init(shape, dtype, cache_dtype, platform=platform) for _ in range(2))
            return FullCache(k, v) if limit is None else WindowCache(k, v, limit)

        return cls(
            tuple(layer(window) for window in config.windows[: config.layers // stages]),
            jnp.full((batch, kv_seq), -1, jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    @property
    def kv_seq(self) -> int:
        """The number of slots in each row."""
        return self.positions.shape[1]

    @property
    def cache_dtype(self) -> CacheDType | None:
        """The codes of keys and values; `None` for floats."""
        return self.layers[0].k_buffer.cache_dtype

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

    def keep(self, length: Int[Array, " batch"] | Int[Array, ""] | int) -> "Cache":
        """The cache without the tokens at position `length` and after it, one length for all rows or one a row.

        Their slots are not used again.
        """
        kept = self.positions < jnp.reshape(jnp.asarray(length, jnp.int32), (-1, 1))
        return Cache(self.layers, jnp.where(kept, self.positions, -1), self.used)
