"""Which slots of a KV cache each device has, where the strategy splits `kv_seq`.

Slots are distributed round-robin: slot `i` belongs to shard `i % shards`. So at every length all shards have the same
number of tokens, to within one, and a cache grows without moving a token.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ..parallel import Strategy, shard_index


def own_slots(x: Array, slot: Int[Array, ""], strategy: Strategy, *, axis: int, fill: int = 0) -> Array:
    """The tokens whose keys and values this device keeps.

    Each device gets `ceil(n / shards)` of `n` tokens. Where that is one too many, the last is `fill`: it is written to
    a free slot, which the next token overwrites.

    **Arguments:**

    - `x`: an array with one entry for each token along `axis`.
    - `slot`: the slot of the first token.
    """
    shard, shards = shard_index("kv_seq", strategy)
    if shards == 1:
        return x
    tokens = x.shape[axis]
    rounds = math.ceil(tokens / shards)
    padding = [(0, rounds * shards - tokens if at == axis else 0) for at in range(x.ndim)]
    dealt = jnp.pad(x, padding, constant_values=fill).reshape(*x.shape[:axis], rounds, shards, *x.shape[axis + 1 :])
    return lax.dynamic_index_in_dim(dealt, (shard - slot) % shards, axis + 1, keepdims=False)


def own_slot(slot: Int[Array, ""], strategy: Strategy) -> Int[Array, ""]:
    """The slot, in this device's shard of the cache, of the first token that `own_slots` gives it."""
    shard, shards = shard_index("kv_seq", strategy)
    return slot if shards == 1 else (slot + (shard - slot) % shards) // shards


def slots_for(tokens: int, shards: int) -> int:
    """The number of slots of a cache for `tokens`, on all devices together.

    Each shard has one slot more than tokens, for the `fill` of `own_slots`. Its size is a multiple of 8, the rows of a
    tile on TPUs: otherwise the cache would get another layout at each call.
    """
    if shards == 1:
        return tokens
    per_shard = -(-tokens // shards) + 1
    return -(-per_shard // 8) * 8 * shards


def tokens_in(kv_seq: int, shards: int) -> int:
    """The number of tokens for which a cache of `kv_seq` slots has room: the inverse of `slots_for`."""
    return kv_seq if shards == 1 else kv_seq - shards


def window_slots(window: int, chunk: int, shards: int) -> int:
    """The most slots that one device needs for a layer with a window, if a chunk has at most `chunk` tokens.

    A whole chunk is written before its first token attends to a whole window. One slot more is for the `fill` of
    `own_slots`.
    """
    return -(-(window + chunk) // shards) + 2
