"""Keys and values of the beginnings of prompts, for the next prompt that begins alike."""

import dataclasses
import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ..nn import Cache, Mistral
from ..nn.cache import AbstractLayerCache
from ..parallel import Strategy, shard_index, specs, spmd, vary_alike


class Block(eqx.Module):
    """The keys and values of a few tokens in all layers."""

    layers: tuple[AbstractLayerCache, ...]


@dataclasses.dataclass(eq=False)
class _Node:
    """A block, and the blocks that continue it by their tokens."""

    block: Block | None
    key: tuple[int, ...] = ()
    parent: "_Node | None" = None
    used: int = 0
    children: dict[tuple[int, ...], "_Node"] = dataclasses.field(default_factory=dict)


class PrefixCache:
    """Trees of blocks by their tokens, one for each adapter: keys and values depend on all tokens before them.

    If the blocks take more than `limit` bytes, those that were not used for the longest time are dropped first, and
    none before its continuations.

    **Attributes:**

    - `block`: the number of tokens in a block.
    - `limit`: the most bytes; 0 keeps none.
    - `bytes`: the size of all blocks.
    """

    def __init__(self, block: int, limit: int):
        self.block = block
        self.bytes = 0
        self.limit = limit
        self._roots: dict[int, _Node] = {}
        self._leaves: set[_Node] = set()
        self._clock = itertools.count(1)

    def find(self, ids: Sequence[int], adapter: int = -1) -> list[Block]:
        """The blocks of the longest known beginning of these tokens."""
        node, found = self._root(adapter), []
        for start in range(0, len(ids) - self.block + 1, self.block):
            node = node.children.get(tuple(ids[start : start + self.block]))
            if node is None or node.block is None:
                break
            node.used = next(self._clock)
            found.append(node.block)
        return found

    def restored(self, model: Mistral, cache: Cache, blocks: Sequence[Block]) -> Cache:
        """An empty cache with these blocks in its first slots; the cache is donated."""
        for number, block in enumerate(blocks):
            cache = _put((model.mesh, model.strategy, block, np.asarray(number, np.int32)), cache)
        return cache

    def add(self, model: Mistral, ids: Sequence[int], cache: Cache, adapter: int = -1):
        """Keeps the whole blocks of a prompt, whose token of position `i` is in slot `i` of the cache."""
        node = self._root(adapter)
        for number in range(len(ids) // self.block if self.limit > 0 else 0):
            key = tuple(ids[number * self.block : (number + 1) * self.block])
            child = node.children.get(key)
            if child is None:
                block = _take(model.mesh, model.strategy, cache, np.asarray(number, np.int32), self.block)
                child = node.children[key] = _Node(block, key, node)
                self.bytes += _bytes(block)
                self._leaves.discard(node)
                self._leaves.add(child)
            child.used = next(self._clock)
            node = child
        while self.bytes > self.limit:
            self._drop(min(self._leaves, key=lambda leaf: leaf.used))

    def _root(self, adapter: int) -> _Node:
        return self._roots.setdefault(adapter, _Node(None))

    def _drop(self, leaf: _Node):
        self._leaves.remove(leaf)
        self.bytes -= _bytes(leaf.block)
        parent = leaf.parent
        if parent is None:
            return
        del parent.children[leaf.key]
        if not parent.children and parent.parent is not None:
            self._leaves.add(parent)


def _bytes(block: Block | None) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(block))


@eqx.filter_jit
def _take(mesh: Mesh | None, strategy: Strategy, cache: Cache, number: Int[Array | np.ndarray, ""], size: int) -> Block:
    """The keys and values of a block of `size` tokens."""
    share = size // strategy.parts("kv_seq", mesh)

    def take(number: Array, layers: tuple[AbstractLayerCache, ...]) -> Block:
        return Block(jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, number * share, share, axis=2), layers))

    split = specs(cache.layers, strategy)
    return spmd(take, mesh, (strategy.spec(""), split), Block(split))(jnp.asarray(number), cache.layers)


@eqx.filter_jit(donate="all-except-first")
def _put(kept: tuple[Mesh | None, Strategy, Block, Int[Array | np.ndarray, ""]], cache: Cache) -> Cache:
    """Writes a block into its slots of a cache, which is donated."""
    mesh, strategy, block, number = kept
    shards = strategy.parts("kv_seq", mesh)

    def put(number: Array, block: Block, cache: Cache) -> Cache:
        share = jax.tree.leaves(block)[0].shape[2]
        at = number * share
        layers = jax.tree.map(
            lambda x, new: lax.dynamic_update_slice_in_dim(x, new, at, axis=2), cache.layers, block.layers
        )
        shard, _ = shard_index("kv_seq", strategy)
        positions = (at + jnp.arange(share, dtype=jnp.int32)) * shards + shard
        positions = jnp.broadcast_to(positions, (cache.positions.shape[0], share))
        positions, _ = vary_alike(positions, cache.positions)
        positions = lax.dynamic_update_slice_in_dim(cache.positions, positions, at, axis=1)
        return Cache(layers, positions, (number + 1) * share * shards)

    layers = specs(cache, strategy)
    in_specs = strategy.spec(""), specs(block, strategy), layers
    return spmd(put, mesh, in_specs, layers)(jnp.asarray(number), block, cache)
