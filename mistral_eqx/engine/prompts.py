"""Chunked prefill of one prompt, in a cache of its own."""

import math

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int

from ..checks import CacheDType
from ..generation.caches import parts, slots
from ..generation.flat import Flat
from ..generation.prompt import bucket
from ..generation.reading import place_rows
from ..lora import for_rows
from ..nn import Cache, Mistral
from ..parallel import specs, spmd
from .prefix_cache import PrefixCache
from .ring import empty_ring, joined, parted, ring_capacity


@eqx.filter_jit(donate="all-except-first")
def read_chunk(
    kept: tuple[Flat, Flat | None, Int[Array, "batch seq"], Int[Array, "batch seq"], Int[Array, " batch"]], cache: Cache
) -> Cache:
    """Reads tokens into a cache, which is donated.

    **Arguments:**

    - `kept`: the model, the draft if there is one, token ids and their positions, -1 for padding, and the number of
        each row's adapter.
    """
    flat, drafter, ids, positions, adapter = kept
    model: Mistral = flat.tree
    draft: Mistral | None = None if drafter is None else drafter.tree

    def forward(
        model: Mistral, draft: Mistral | None, ids: Array, positions: Array, adapter: Array, cache: Cache
    ) -> Cache:
        own, drafted = parted(cache, model.config.layers)
        _, own = for_rows(model, adapter).hidden(ids, positions, own)
        return own if draft is None else joined(own, draft.hidden(ids, positions, drafted)[1])

    strategy = model.strategy
    rows, layers = strategy.spec("batch"), specs(cache, strategy)
    drafts = None if draft is None else specs(draft, strategy)
    in_specs = specs(model, strategy), drafts, rows, rows, rows, layers
    return spmd(forward, model.mesh, in_specs, layers)(model, draft, ids, positions, adapter, cache)


def chunk_width(left: int, size: int, room: int) -> int:
    """The width of the next chunk: the least power of two that holds all tokens, at least 16, so that few programs are
    compiled.

    **Arguments:**

    - `left`: how many tokens are to be read.
    - `size`: the most tokens of a chunk.
    - `room`: how many slots are free.
    """
    width = min(size, bucket(left, step=16, per_octave=1))
    while width > room:
        width = max(width // 2, min(room, 16))
    return width


class PromptReader:
    """Reads a prompt chunk by chunk, without the tokens whose keys and values are in the prefix cache.

    **Attributes:**

    - `ids`: the tokens to read; there may be none.
    - `known`: how many of them came out of the prefix cache.
    - `cache`: the cache so far, of the model and of its draft if there is one, once for each part of `batch`. The token
        of position `i` is in slot `i`.
    """

    def __init__(
        self,
        flat: Flat,
        ids: tuple[int, ...],
        prefixes: PrefixCache,
        cache_dtype: CacheDType | None,
        adapter: int = -1,
        draft: Flat | None = None,
    ):
        model: Mistral = flat.tree
        found = prefixes.find(ids, adapter)
        self.ids = ids
        self.known = len(found) * prefixes.block
        self._flat, self._draft, self._rows, self._adapter = flat, draft, parts(model, "batch"), adapter
        self._read = self.known
        self._room = ring_capacity(len(ids))
        cache = empty_ring(model, draft, self._rows, slots(model, self._room), cache_dtype)
        self.cache: Cache = prefixes.restored(model, cache, found)

    @property
    def done(self) -> bool:
        """Whether all tokens are in the cache."""
        return self._read == len(self.ids)

    def read(self, size: int) -> int:
        """Reads one chunk of at most `size` tokens, and returns its width."""
        model: Mistral = self._flat.tree
        start = self._read
        width = chunk_width(len(self.ids) - start, size, self._room - start)
        part = self.ids[start : start + width]
        ids, positions = np.zeros((self._rows, width), np.int32), np.full((self._rows, width), -1, np.int32)
        ids[:, : len(part)], positions[:, : len(part)] = part, np.arange(start, start + len(part))
        adapter = np.full(self._rows, self._adapter, np.int32)
        ids, positions, adapter = (place_rows(model, x) for x in (ids, positions, adapter))
        self.cache = read_chunk((self._flat, self._draft, ids, positions, adapter), self.cache)
        self._read += len(part)
        return width


def block_size(model: Mistral) -> int:
    """The number of tokens in a block of the prefix cache, which each shard of `kv_seq` divides."""
    return math.lcm(32, parts(model, "kv_seq"))
