"""The KV cache of an engine: a ring of slots, with one write pointer for all rows.

Each pass writes one token of every row into the slot at the pointer, so the cache is updated in place. After the last
slot the pointer goes back to the first. A pass over proposed tokens writes several slots; the pointer then moves on by
as many as the row with the most new tokens has, and the others have slots without tokens. The text of a row that
entered is in the slots before the pointer, however many slots the other rows have. The mask depends on positions alone,
so that the slots of one row need no order, and a slot without a token has position -1.

Where the strategy splits `kv_seq`, the tokens of an entering row are dealt out as they are in its own cache: the
pointer first moves on to a multiple of the number of shards. A device that does not store a token writes padding into
its next slot. So the ring needs as many spare slots as there are shards.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ..checks import CacheDType
from ..generation.caches import empty_cache, parts
from ..generation.flat import Flat
from ..generation.prompt import bucket
from ..nn import Cache, Mistral
from ..parallel import Strategy, shard_index


def ring_capacity(count: int) -> int:
    """The size of a ring for at least `count` tokens: one size per octave, so that few programs are compiled."""
    return bucket(count, step=256, per_octave=1)


def spare(model: Mistral) -> int:
    """How many slots before the pointer may hold padding."""
    shards = parts(model, "kv_seq")
    return 0 if shards == 1 else shards


def aligned(model: Mistral, slot: int) -> int:
    """The first slot from `slot` on at which a row can enter."""
    shards = parts(model, "kv_seq")
    return -(-slot // shards) * shards


def empty_ring(model: Mistral, draft: Flat | None, rows: int, kv_seq: int, cache_dtype: CacheDType | None) -> Cache:
    """An empty cache of a model, and of its draft if there is one: see `joined`."""
    cache = empty_cache(model, rows, kv_seq, cache_dtype=cache_dtype)
    if draft is None:
        return cache
    return joined(cache, empty_cache(draft.tree, rows, kv_seq, cache_dtype=cache_dtype))


def joined(cache: Cache, drafted: Cache) -> Cache:
    """A model's cache with the layers of its draft, which have the same slots, positions and pointer."""
    return Cache((*cache.layers, *drafted.layers), cache.positions, cache.used)


def parted(cache: Cache, count: int) -> tuple[Cache, Cache]:
    """The inverse of `joined`: the first `count` layers are the model's; without a draft there are no others."""
    own, drafted = (
        Cache(layers, cache.positions, cache.used) for layers in (cache.layers[:count], cache.layers[count:])
    )
    return own, drafted


def turned(cache: Cache, width: int, strategy: Strategy) -> tuple[Cache, Int[Array, ""]]:
    """The cache with its pointer in the ring again, and so many slots before its end; and how many were skipped."""
    own, shards = _own(cache, strategy)
    used = cache.used % (own * shards)
    skipped = jnp.where(used + width > own * shards, own * shards - used, 0)
    return Cache(cache.layers, cache.positions, (used + skipped) % (own * shards)), skipped


def entered_cache(
    cache: Cache,
    prompt: Cache,
    length: Int[Array, ""],
    put: Callable[[Array, Array], Array],
    strategy: Strategy,
) -> Cache:
    """The cache with the tokens of one more row, whose text ends before the pointer.

    **Arguments:**

    - `prompt`: a cache of one row, with the token of position `i` in slot `i`.
    - `length`: the number of tokens in it.
    - `put`: puts a row `(1, ...)` into an array of all rows.
    """
    (own, shards), (own_prompt, _) = _own(cache, strategy), _own(prompt, strategy)
    pointer = -(-cache.used // shards)
    start = pointer + length // -shards

    def place(x: Array, row: Array, axis: int, fill: int) -> Array:
        row = lax.slice_in_dim(row, 0, own_prompt, axis=axis)
        row = jnp.roll(_padded(row, own - own_prompt, axis, fill), start, axis=axis)
        return put(x, _padded(row, x.shape[axis] - own, axis, fill))

    layers = jax.tree.map(lambda x, row: place(x, row, 2, 0), cache.layers, prompt.layers)
    positions = place(cache.positions, prompt.positions, 1, -1)
    return Cache(layers, positions, pointer * shards % (own * shards))


def resized_cache(cache: Cache, order: Int[Array, " new"], share: int, strategy: Strategy) -> Cache:
    """A copy of a ring with other rows and slots, which has the last tokens before the pointer.

    **Arguments:**

    - `order`: for each row of this device the old one that it continues, -1 for an empty row.
    - `share`: the number of slots on this device.
    """
    own, shards = _own(cache, strategy)
    new = share if shards == 1 else share - 1
    kept = min(own, new)
    pointer = -(-cache.used // shards)

    def last(x: Array, axis: int, fill: int) -> Array:
        x = jnp.take(x, order, axis=0, mode="clip")
        x = jnp.roll(lax.slice_in_dim(x, 0, own, axis=axis), -pointer, axis=axis)
        return _padded(lax.slice_in_dim(x, own - kept, own, axis=axis), share - kept, axis, fill)

    layers = jax.tree.map(lambda x: last(x, 2, 0), cache.layers)
    positions = jnp.where((order >= 0)[:, None], last(cache.positions, 1, -1), -1)
    return Cache(layers, positions, jnp.full_like(cache.used, kept * shards % (new * shards)))


def _own(cache: Cache, strategy: Strategy) -> tuple[int, int]:
    """The number of this device's slots, without the one for padding, and the number of shards."""
    _, shards = shard_index("kv_seq", strategy)
    return (cache.kv_seq if shards == 1 else cache.kv_seq - 1), shards


def _padded(x: Array, more: int, axis: int, fill: int) -> Array:
    return jnp.pad(x, [(0, more if at == axis else 0) for at in range(x.ndim)], constant_values=fill)
