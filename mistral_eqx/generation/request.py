"""A checked call: everything that a decoding step needs besides its state."""

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from annotated_types import Ge, Le
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Key, PyTree

from ..checks import CacheDType, Count, checked
from ..documents import shown
from ..errors import InputError
from ..nn import Cache, Mistral
from ..parallel import gather_to_host, put_on_mesh, specs
from .caches import capacity, empty_cache, first_room, grow, holds, pack, parts, slots
from .clock import clock_of
from .finite import not_finite
from .flat import Flat
from .guided import Allowed, Grammar, Guides, grammars_of, without_grammars
from .in_flight import decode_in_groups
from .loop import Decoding, decode, first_tokens, grow_state
from .prefix import Prefix, checked_prefix
from .processors import MinNewTokens
from .prompt import pad_left
from .proposals import Draft, PromptLookup, Speculate, checked_speculate
from .reading import CHUNK, check_chunk, check_context, place_rows, prompt_width, read_chunks
from .sampler import Sampler
from .speculation import Balance, Limits, Speculation, Tally, grow_text, speculate
from .stops import Stops


# The default of `max_new_tokens`, where the context has room.
_NEW_TOKENS = 256
# Fewer new tokens than these are too few to measure what proposals cost.
_MEASURED = 24
# A cache of which more than this share would be tokens grows; one with more padding is packed.
_FULL = 0.75
# As many passes as fit.
_MANY = 2**30

Cached: TypeAlias = Cache | Speculation
"""What a loop updates in place: a cache, or the caches of speculation."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked call of `generate` or `stream`: everything that a decoding step needs besides its state.

    **Attributes:**

    - `ends`: the tokens that end a row.
    - `keys`: one a row, idle rows included.
    - `idle`: how many rows are added so that `batch` can be split; they have ended from the start.
    - `samples`: the number of rows of each prompt.
    - `states`: the first states of the sampler's processors.
    - `grammars`: the grammar of each processor, `None` for one without; the sampler itself has none.
    - `alternatives`: how many likeliest tokens to record at each step; `None` for no log-probabilities.
    - `prefix`: the beginning of all prompts.
    - `chunk`: the size of prefill chunks.
    - `cache_dtype`: the codes of keys and values; `None` for floats.
    - `speculate`: where proposed tokens come from; `None` for none.
    """

    model: Mistral
    sampler: Sampler
    ends: Int[np.ndarray, " ends"]
    keys: Key[Array, " batch"]
    max_new_tokens: int
    idle: int
    samples: int = 1
    states: tuple[PyTree, ...] = ()
    grammars: tuple[Grammar | None, ...] = ()
    alternatives: int | None = None
    prefix: Prefix | None = None
    chunk: int = CHUNK
    cache_dtype: CacheDType | None = None
    speculate: Speculate | None = None

    @classmethod
    def init(
        cls,
        model: Mistral,
        rows: list[list[int]],
        max_new_tokens: int | None,
        sampler: Sampler,
        eos_id: int | Sequence[int] | None,
        key: Key[Array, "..."] | None,
        *,
        num_samples: int = 1,
        logprobs: int | None = None,
        prefix: Prefix | None = None,
        prefill_chunk: int = CHUNK,
        cache_dtype: CacheDType | None = None,
        speculate: Speculate | None = None,
    ) -> "Request":
        """Checks the arguments of `generate`.

        **Raises:** `ValueError` as `generate` says.
        """
        checked(model, Mistral, "model")
        checked(sampler, Sampler, "sampler")
        checked(prefix, Prefix | None, "prefix", remedy="mistral_eqx.prefill makes one")
        checked(cache_dtype, CacheDType | None, "cache_dtype")
        speculate = checked_speculate(speculate, model)
        vocab = model.config.vocab
        before = [] if prefix is None else checked_prefix(prefix, model, cache_dtype)
        longest, context = len(before) + max(map(len, rows)), model.config.max_positions
        room = max(1, min(_NEW_TOKENS, context - longest))
        new_tokens = checked(room if max_new_tokens is None else max_new_tokens, Count, "max_new_tokens")
        check_context(longest, new_tokens, context)
        prefill_chunk = check_chunk(prefill_chunk)
        num_samples = checked(num_samples, Count, "num_samples")
        if num_samples > 1 and sampler.greedy:
            raise InputError(
                f"num_samples is {num_samples}, but without drawing all samples of a prompt are the same; give a "
                "temperature."
            )
        logprobs = None if logprobs is None else checked(logprobs, Annotated[int, Ge(0), Le(vocab)], "logprobs")
        if logprobs is not None and speculate is not None:
            raise InputError("logprobs are not recorded with speculate; leave one of the two out.")
        if speculate is not None and any(grammars_of(sampler)):
            raise InputError("A grammar allows one token at a time; leave speculate out.", key="speculate")
        idle = -len(rows) % parts(model, "batch")
        keys = _row_keys(key, sampler, len(rows), idle, num_samples)
        given: Any = model.config.eos_ids if eos_id is None else eos_id
        ends: list[Any] = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        for end in ends:
            if not 0 <= checked(end, int, "The end token", key="eos_id") < vocab:
                raise InputError(
                    f"The end token {shown(end)} is outside the vocabulary of {vocab}; give eos_id=() if "
                    "nothing is to stop early."
                )
        for processor in sampler.processors:
            if isinstance(processor, MinNewTokens) and processor.count > new_tokens:
                raise InputError(
                    f"MinNewTokens asks for at least {processor.count} new tokens, but max_new_tokens is "
                    f"{new_tokens}; ask for fewer, or let there be more."
                )
        texts = [[*before, *row] for row in (*rows, *rows[:1] * idle) for _ in range(num_samples)]
        states = tuple(processor.init_state(texts, ends, vocab) for processor in sampler.processors)
        return cls(
            model=model,
            sampler=placed(model, without_grammars(sampler)),
            ends=np.asarray(ends, np.int32),
            keys=jr.wrap_key_data(place_rows(model, jr.key_data(keys)), impl=jr.key_impl(keys)),
            max_new_tokens=new_tokens,
            idle=idle,
            samples=num_samples,
            states=placed(model, states),
            grammars=grammars_of(sampler),
            alternatives=logprobs,
            prefix=prefix,
            chunk=prefill_chunk,
            cache_dtype=cache_dtype,
            speculate=speculate,
        )

    @functools.cached_property
    def _flat(self) -> Flat:
        return Flat(self.model)

    @property
    def _drafter(self) -> Mistral:
        """The draft; the model itself without one."""
        return self.speculate.model if isinstance(self.speculate, Draft) else self.model

    @property
    def _spare(self) -> int:
        """The slots that a pass needs besides one."""
        return 0 if self.speculate is None else self.speculate.tokens

    def start(self, rows: list[list[int]], *, forgets: bool = True) -> tuple[Decoding, Cached]:
        """Prefills a new cache with room for new tokens, and decodes the first token.

        **Arguments:**

        - `forgets`: whether layers with a window keep only the tokens inside the window. Must be false if padded
            sequences are added to the cache later, or tokens removed.
        """
        prefix, width = self.prefix, prompt_width(max(map(len, rows)))
        # Rejected proposals are such tokens.
        forgets = forgets and self.speculate is None
        # Attention reads the whole cache, so during prefill it has no more slots than the prompt.
        if prefix is None:
            ids, positions = pad_left(rows, width)
            chunk = min(self.chunk, width) if forgets else None
            cache = empty_cache(self.model, len(rows) + self.idle, slots(self.model, width), chunk, self.cache_dtype)
        else:
            ids, positions = pad_left(rows, width, starts=[len(prefix.ids)] * len(rows))
            room = slots(self.model, int(prefix.cache.used) + width)
            copies = (len(rows) + self.idle) // parts(self.model, "batch")
            cache = grow(self.model, prefix.cache, max(room, prefix.cache.kv_seq), copies)
        decoding, cache = self.read(ids, positions, cache)
        return decoding, self.begin(rows, decoding, cache)

    def _prefilled(
        self, model: Mistral, ids: Int[np.ndarray, "rows seq"], positions: Int[np.ndarray, "rows seq"], cache: Cache
    ) -> tuple[Array, Cache]:
        """The last logits, and a cache with these tokens, with room for new ones, and with a row for each sample."""
        ids, positions = (np.concatenate([x, *[x[:1]] * self.idle]) for x in (ids, positions))
        logits, cache = read_chunks(model, ids, positions, cache, self.chunk)
        room = slots(model, capacity(int(cache.used) + first_room(self.max_new_tokens) + self._spare))
        if room > cache.kv_seq or self.samples > 1:
            cache = grow(model, cache, max(room, cache.kv_seq), self.samples)
        return logits, cache

    def read(
        self, ids: Int[np.ndarray, "rows seq"], positions: Int[np.ndarray, "rows seq"], cache: Cache
    ) -> tuple[Decoding, Cache]:
        """Prefills a cache in chunks, makes room for new tokens, and decodes the first of them."""
        logits, cache = self._prefilled(self.model, ids, positions, cache)
        ended = np.arange(len(ids) + self.idle) >= len(ids)
        positions = np.concatenate([positions, *[positions[:1]] * self.idle])
        # The last column holds each row's last token.
        at, ended = (place_rows(self.model, np.repeat(x, self.samples)) for x in (positions[:, -1], ended))
        decoding = first_tokens(
            self.model,
            logits,
            at,
            self.keys,
            ended,
            self.sampler,
            self.ends,
            cache.kv_seq,
            self.states,
            self.alternatives,
        )
        self._check(decoding)
        return decoding, cache

    def begin(
        self, rows: list[list[int]], decoding: Decoding, cache: Cache, draft_cache: Cache | None = None, known: int = 0
    ) -> Cached:
        """What the loop updates in place: the cache itself or, with speculation, more than that.

        **Arguments:**

        - `rows`: the prompts.
        - `decoding`, `cache`: after the first new token.
        - `draft_cache`: a draft's cache with the first `known` tokens of the prompts; by default an empty one.
        """
        if self.speculate is None:
            return cache
        before = () if self.prefix is None else self.prefix.ids
        texts = [[*before, *row] for row in rows]
        if isinstance(self.speculate, Draft):
            draft, width = self.speculate.model, prompt_width(max(map(len, texts)) - known)
            ids, positions = pad_left([text[known:] for text in texts], width, starts=[known] * len(texts))
            if draft_cache is None:
                draft_cache = empty_cache(
                    draft, len(rows) + self.idle, slots(draft, width), cache_dtype=self.cache_dtype
                )
            else:
                room = slots(draft, int(draft_cache.used) + width)
                draft_cache = grow(draft, draft_cache, max(room, draft_cache.kv_seq)).keep(known)
            _, draft_cache = self._prefilled(draft, ids, positions, draft_cache)
        text = np.zeros((len(rows) + self.idle, self._text_width(cache)), np.int32)
        for row, ids in enumerate(texts):
            text[row, : len(ids)] = ids
        text = np.repeat(text, self.samples, axis=0)
        text[np.arange(len(text)), gather_to_host(decoding.position)] = gather_to_host(decoding.token)
        balance, tally = placed(self.model, (Balance.init(self.speculate), Tally.init()))
        return Speculation(cache, draft_cache, place_rows(self.model, text), balance, tally)

    def _text_width(self, cache: Cache) -> int:
        # Each token but the last has a slot.
        return cache.kv_seq + 1

    def decode(self, decoding: Decoding, cache: Cached, until: int) -> tuple[Decoding, Cached]:
        """Decodes until there are `until` new tokens, or all rows have ended.

        A full cache is replaced by one of at most twice its size, for which another loop is compiled.
        """
        if isinstance(cache, Speculation):
            return self._speculate(decoding, cache, until)
        stages, rows = parts(self.model, "layers"), decoding.token.shape[0] // parts(self.model, "batch")
        # Groups of rows that are in flight leave the stages in one more round, which one token is not worth.
        in_groups = stages > 1 and rows % stages == 0 and until - int(decoding.step) > 1
        while decoding.unfinished and (step := int(decoding.step)) < until:
            used, room = int(cache.used), holds(self.model, cache.kv_seq)
            if used == room:
                room = min(2 * room, capacity(used + self.max_new_tokens - step))
                cache = grow(self.model, cache, slots(self.model, room))
                decoding = grow_state(self.model, decoding, cache.kv_seq)
            # The last token is not in the cache yet, so each slot gives one more.
            target = np.asarray(min(until, step + room - used), np.int32)
            kept = self._flat, decoding, self.sampler, self.ends, target
            decoding, cache = decode_in_groups(kept, cache) if in_groups else decode(kept, cache)
            self._check(decoding)
        return decoding, cache

    def _speculate(self, decoding: Decoding, now: Speculation, until: int) -> tuple[Decoding, Speculation]:
        wanted = self.speculate
        assert wanted is not None  # without it, `begin` returns no `Speculation`
        draft, ngram = (None, wanted.ngram) if isinstance(wanted, PromptLookup) else (wanted.flat, 0)
        kind = self._flat.structure, draft and draft.structure, self.model.dtype, wanted.tokens
        clock = clock_of(*kind, decoding.token.shape[0])
        while decoding.unfinished and (step := int(decoding.step)) < until:
            now, decoding = self._with_room(now, decoding)
            cost, passes = clock.cost if wanted.cost is None else wanted.cost, _MANY
            if measures := cost is None and self.max_new_tokens - step > _MEASURED:
                cost, passes = clock.wanted, 1
            limits = Limits.init(
                until=until,
                new_tokens=self.max_new_tokens,
                room=holds(self.model, now.cache.kv_seq),
                draft_room=0 if now.draft is None else holds(self._drafter, now.draft.kv_seq),
                passes=passes,
                # Before anything is known, proposals are tried.
                cost=1.0 if cost is None else cost,
            )
            start = time.perf_counter()
            kept = self._flat, draft, decoding, self.sampler, self.ends, limits, wanted.tokens, ngram
            decoding, now = speculate(kept, now)
            if measures:
                jax.block_until_ready(decoding.token)
                clock.add(time.perf_counter() - start)
            self._check(decoding)
        return decoding, now

    def _with_room(self, now: Speculation, decoding: Decoding) -> tuple[Speculation, Decoding]:
        """The same, with room in its caches for a pass over proposals."""
        left = self.max_new_tokens - int(decoding.step) + self._spare
        cache = self._roomy(self.model, now.cache, left)
        if cache is not now.cache:
            text = grow_text(self.model, now.text, self._text_width(cache))
            now = dataclasses.replace(now, cache=cache, text=text)
            decoding = grow_state(self.model, decoding, cache.kv_seq)
        if now.draft is not None:
            now = dataclasses.replace(now, draft=self._roomy(self._drafter, now.draft, left))
        return now, decoding

    def _roomy(self, model: Mistral, cache: Cache, left: int) -> Cache:
        """A cache with room for a pass over proposals; `left` is the most that will be needed without padding."""
        room, needed = holds(model, cache.kv_seq), self._spare + 1
        if int(cache.used) + needed <= room:
            return cache
        tokens = int((gather_to_host(cache.positions) >= 0).sum(axis=1).max())
        if tokens + needed <= _FULL * room:
            cache = pack(model, cache)
        if (used := int(cache.used)) + needed > room:
            cache = grow(model, cache, slots(model, min(2 * room, capacity(used + max(left, needed)))))
        return cache

    def steps(
        self, decoding: Decoding, cache: Cached, size: int, stops: Stops | None = None
    ) -> Iterator[tuple[Decoding, Cached]]:
        """The state and the cache after the first token, and after each `size` more of them.

        **Arguments:**

        - `size`: 1 is used if there is a grammar.
        - `stops`: looks for stop strings each time; a row with a stop string has ended.
        """
        guides = Guides(self.grammars, decoding.token.shape[0])
        size = 1 if guides else size
        while True:
            if stops is not None:
                decoding = self._stop(decoding, stops)
            yield decoding, cache
            if not decoding.unfinished or int(decoding.step) >= self.max_new_tokens:
                return
            if guides:
                decoding = self._guide(decoding, guides)
            until = min(int(decoding.step) + size, self.max_new_tokens)
            decoding, cache = self.decode(decoding, cache, until)

    def _stop(self, decoding: Decoding, stops: Stops) -> Decoding:
        rows = len(stops.lengths)
        ended = gather_to_host(decoding.ended).copy()
        stopped = stops.read(gather_to_host(decoding.tokens)[:rows], gather_to_host(decoding.lengths)[:rows])
        if not (stopped & ~ended[:rows]).any():
            return decoding
        ended[:rows] |= stopped
        unfinished = np.asarray(not ended.all())
        mesh = self.model.mesh
        return dataclasses.replace(
            decoding,
            ended=place_rows(self.model, ended),
            unfinished=jnp.asarray(unfinished) if mesh is None else put_on_mesh(unfinished, mesh, PartitionSpec()),
        )

    def _guide(self, decoding: Decoding, guides: Guides) -> Decoding:
        tokens, ended = gather_to_host(decoding.token), gather_to_host(decoding.ended)
        masks = guides.push(tokens, ended, self.model.config.vocab)
        states = tuple(
            state if mask is None else Allowed(place_rows(self.model, mask, "batch vocab"))
            for state, mask in zip(decoding.states, masks, strict=True)
        )
        return dataclasses.replace(decoding, states=states)

    def _check(self, decoding: Decoding):
        if decoding.unfinished:
            return
        if (lost := gather_to_host(decoding.lost)).any():
            row = int(np.argmax(lost != 0))
            new = int(gather_to_host(decoding.lengths)[row])
            if lost[row] > 0:
                raise not_finite(f"new token {new} of row {row}", processors=bool(self.sampler.processors))
            raise InputError(
                f"The processors forbid every token to row {row} after {new - 1} new ones; let them allow at least "
                "one, such as an end token."
            )


def _row_keys(
    key: Key[Array, "..."] | None, sampler: Sampler, batch: int, idle: int, samples: int
) -> Key[Array, " rows"]:
    """One key for each row, from the argument `key`."""
    if key is None:
        if not sampler.greedy:
            raise InputError("Sampling draws random numbers; give a key, such as key=jax.random.key(0).")
        key = jr.key(0)
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise InputError("The key must be one that jax.random.key made, such as key=jax.random.key(0).")
    fold = jax.vmap(jr.fold_in, in_axes=(None, 0))
    if key.ndim == 0:
        return fold(key, jnp.arange((batch + idle) * samples))
    if key.shape != (batch,):
        raise InputError(f"There are {batch} prompts and keys of shape {key.shape}; give one key, or one a prompt.")
    if samples > 1:
        key = jax.vmap(fold, in_axes=(0, None))(key, jnp.arange(samples)).reshape(-1)
    return jnp.concatenate([key, *[key[:1]] * (idle * samples)])


def placed(model: Mistral, tree: PyTree) -> PyTree:
    """Puts the arrays of modules on the model's devices, since a numpy array is sent with each call."""
    mesh = model.mesh
    if mesh is None:
        return tree
    arrays, others = eqx.partition(tree, eqx.is_array)
    placed = jax.tree.map(lambda x, spec: put_on_mesh(np.asarray(x), mesh, spec), arrays, specs(arrays, model.strategy))
    return eqx.combine(placed, others)
