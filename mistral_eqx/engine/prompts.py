"""Chunked prefill of one prompt, in a cache of its own."""

import collections
import math

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int

from ..checks import CacheDType
from ..generation.caches import empty_cache, parts, slots
from ..generation.flat import Flat
from ..generation.prompt import bucket
from ..generation.reading import place_rows
from ..lora import for_rows
from ..nn import Cache, Mistral
from ..parallel import specs, spmd
from .prefix_cache import PrefixCache
from .ring import ring_capacity


@eqx.filter_jit(donate="all-except-first")
def read_chunk(
    kept: tuple[Flat, Int[Array, "batch seq"], Int[Array, "batch seq"], Int[Array, " batch"]], cache: Cache
) -> Cache:
    """Reads tokens into a cache, which is donated.

    **Arguments:**

    - `kept`: the model, token ids and their positions, -1 for padding, and the number of each row's adapter.
    """
    flat, ids, positions, adapter = kept
    model: Mistral = flat.tree

    def forward(model: Mistral, ids: Array, positions: Array, adapter: Array, cache: Cache) -> Cache:
        return for_rows(model, adapter).hidden(ids, positions, cache)[1]

    strategy = model.strategy
    rows, layers = strategy.spec("batch"), specs(cache, strategy)
    in_specs = specs(model, strategy), rows, rows, rows, layers
    return spmd(forward, model.mesh, in_specs, layers)(model, ids, positions, adapter, cache)


def chunks(known: int, length: int, size: int) -> list[tuple[int, int]]:
    """The chunks in which tokens `known` to `length` are read: the first token of each, and its width.

    All but the last have `size` tokens. The width of the last is a power of two, at least 16, so that few programs are
    compiled.
    """
    starts = range(known, length, size)
    return [(start, min(size, bucket(length - start, step=16, per_octave=1))) for start in starts]


def prompt_slots(model: Mistral, known: int, length: int, size: int) -> int:
    """The size of the cache in which such a prompt is read."""
    start, width = chunks(known, length, size)[-1] if known < length else (known, 0)
    return slots(model, ring_capacity(start + width))


class PromptReader:
    """Reads a prompt chunk by chunk, without the tokens whose keys and values are in the prefix cache.

    **Attributes:**

    - `ids`: the tokens to read; there may be none.
    - `known`: how many of them came out of the prefix cache.
    - `cache`: the cache so far, once for each part of `batch`. The token of position `i` is in slot `i`.
    """

    def __init__(
        self,
        flat: Flat,
        ids: tuple[int, ...],
        size: int,
        prefixes: PrefixCache,
        cache_dtype: CacheDType | None,
        adapter: int = -1,
    ):
        model: Mistral = flat.tree
        found = prefixes.find(ids, adapter)
        self.ids = ids
        self.known = len(found) * prefixes.block
        self._flat, self._rows, self._adapter = flat, parts(model, "batch"), adapter
        self._chunks = collections.deque(chunks(self.known, len(ids), size))
        room = prompt_slots(model, self.known, len(ids), size)
        cache = empty_cache(model, self._rows, room, cache_dtype=cache_dtype)
        self.cache: Cache = prefixes.restored(model, cache, found)

    @property
    def done(self) -> bool:
        """Whether all tokens are in the cache."""
        return not self._chunks

    def read(self):
        """Reads one chunk."""
        model: Mistral = self._flat.tree
        start, width = self._chunks.popleft()
        part = self.ids[start : start + width]
        ids, positions = np.zeros((self._rows, width), np.int32), np.full((self._rows, width), -1, np.int32)
        ids[:, : len(part)], positions[:, : len(part)] = part, np.arange(start, start + len(part))
        adapter = np.full(self._rows, self._adapter, np.int32)
        ids, positions, adapter = (place_rows(model, x) for x in (ids, positions, adapter))
        self.cache = read_chunk((self._flat, ids, positions, adapter), self.cache)


def block_size(model: Mistral) -> int:
    """The number of tokens in a block of the prefix cache, which each shard of `kv_seq` divides."""
    return math.lcm(32, parts(model, "kv_seq"))
