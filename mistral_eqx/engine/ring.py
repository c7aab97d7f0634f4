"""The KV cache of an engine: a ring of slots, with one write pointer for all rows.

Each pass writes one token of every row into the slot at the pointer, so the cache is updated in place. After the last
slot the pointer goes back to the first. The text of a row that entered is in the slots before the pointer, however
many slots the other rows have. The mask depends on positions alone, so that the slots of one row need no order, and a
slot without a token has position -1.

Where the strategy splits `kv_seq`, the tokens of an entering row are dealt out as they are in its own cache: the
pointer first moves on to a multiple of the number of shards. A device that does not store a token writes padding into
its next slot. So the ring needs as many spare slots as there are shards.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ..generation.caches import parts
from ..generation.prompt import bucket
from ..nn import Cache, Mistral
from ..parallel import Strategy, shard_index, specs, spmd


def ring_capacity(count: int) -> int:
    """The size of a ring for at least `count` tokens: one size per octave, so that few programs are compiled."""
    return bucket(count, step=128, per_octave=1)


def spare(model: Mistral) -> int:
    """How many slots before the pointer may hold padding."""
    shards = parts(model, "kv_seq")
    return 0 if shards == 1 else shards


def aligned(model: Mistral, slot: int) -> int:
    """The first slot from `slot` on at which a row can enter."""
    shards = parts(model, "kv_seq")
    return -(-slot // shards) * shards


def turned(cache: Cache, strategy: Strategy) -> Cache:
    """The cache with its pointer in the ring again."""
    own, shards = _own(cache, strategy)
    return Cache(cache.layers, cache.positions, cache.used % (own * shards))


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


@eqx.filter_jit
def resized(model: Mistral, cache: Cache, kv_seq: int) -> Cache:
    """A copy of a ring with `kv_seq` slots, which has the last tokens before the pointer."""
    strategy = model.strategy
    share = kv_seq // parts(model, "kv_seq")

    def copy(cache: Cache) -> Cache:
        own, shards = _own(cache, strategy)
        new = share if shards == 1 else share - 1
        kept = min(own, new)
        pointer = -(-cache.used // shards)

        def last(x: Array, axis: int, fill: int) -> Array:
            x = jnp.roll(lax.slice_in_dim(x, 0, own, axis=axis), -pointer, axis=axis)
            return _padded(lax.slice_in_dim(x, own - kept, own, axis=axis), share - kept, axis, fill)

        layers = jax.tree.map(lambda x: last(x, 2, 0), cache.layers)
        return Cache(layers, last(cache.positions, 1, -1), jnp.full_like(cache.used, kept * shards % (new * shards)))

    split = specs(cache, strategy)
    return spmd(copy, model.mesh, (split,), split)(cache)


def _own(cache: Cache, strategy: Strategy) -> tuple[int, int]:
    """The number of this device's slots, without the one for padding, and the number of shards."""
    _, shards = shard_index("kv_seq", strategy)
    return (cache.kv_seq if shards == 1 else cache.kv_seq - 1), shards


def _padded(x: Array, more: int, axis: int, fill: int) -> Array:
    return jnp.pad(x, [(0, more if at == axis else 0) for at in range(x.ndim)], constant_values=fill)
