"""Which slots of a KV cache each device has, where the strategy splits `kv_seq`.

Slots are dealt out in turn: slot `i` belongs to device `i % shards`. So every device has the same share of the tokens
at every length, and a cache grows without moving any.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ..parallel import Strategy, place


def own_slots(x: Array, slot: Int[Array, ""], strategy: Strategy, *, axis: int, fill: int = 0) -> Array:
    """The tokens whose keys and values this device keeps.

    Of `n` tokens each device gets `ceil(n / shards)`. Where that is one too many, the last is `fill`: written to a free
    slot, it is overwritten by the next token there.

    **Arguments:**

    - `x`: an array with one entry a token along `axis`.
    - `slot`: the slot of the first token.
    """
    shard, shards = place("kv_seq", strategy)
    if shards == 1:
        return x
    tokens = x.shape[axis]
    turns = math.ceil(tokens / shards)
    padding = [(0, turns * shards - tokens if at == axis else 0) for at in range(x.ndim)]
    turned = jnp.pad(x, padding, constant_values=fill).reshape(*x.shape[:axis], turns, shards, *x.shape[axis + 1 :])
    return lax.dynamic_index_in_dim(turned, (shard - slot) % shards, axis + 1, keepdims=False)


def own_slot(slot: Int[Array, ""], strategy: Strategy) -> Int[Array, ""]:
    """Where this device's part of the cache has the first of the tokens that `own_slots` gives it."""
    shard, shards = place("kv_seq", strategy)
    return slot if shards == 1 else (slot + (shard - slot) % shards) // shards


def slots_for(tokens: int, shards: int) -> int:
    """The size of a cache for `tokens`, on all devices together.

    Each device has the same share, and one slot more, which a token of another device may touch. Shares are multiples
    of 8, the rows of a tile on TPUs: otherwise the cache would get another layout at each call.
    """
    if shards == 1:
        return tokens
    share = -(-tokens // shards) + 1
    return -(-share // 8) * 8 * shards


def tokens_in(kv_seq: int, shards: int) -> int:
    """How many tokens a cache of this size has room for: the inverse of `slots_for`."""
    return kv_seq if shards == 1 else kv_seq - shards


def window_slots(window: int, chunk: int, shards: int) -> int:
    """The most slots that one device needs for a layer with a window, if at most `chunk` tokens come at a time.

    The first token of a chunk sees a whole window when the last one has been written already. And a device may touch
    one slot for a token of another device.
    """
    return -(-(window + chunk) // shards) + 2
