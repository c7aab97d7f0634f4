"""Decoding: one compiled `lax.while_loop`."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ..config import MistralConfig
from ..nn import Cache, Mistral
from ..parallel import Strategy, everywhere, place_on, pmax, specs, spmd
from .log_probs import LogProbs
from .prompt import Prompts, bucket, checked_prompts, pad_left
from .sampler import Sampler
from .stops import Stops, Tokenizer, stop_rows


# A prompt is read in pieces of at most this many tokens: scores then take memory for this many queries at a time.
CHUNK = 512
# Where there are stop strings, the loop is left after each of so many tokens, to look for them in the text.
_PIECE = 8


class Decoding(eqx.Module):
    """What the loop carries from token to token, besides the cache.

    **Attributes:**

    - `token`: the last token of each row, which is not in the cache yet.
    - `position`: where that token stands in its row's text.
    - `tokens`: all new tokens so far; the column of the next one is `step`.
    - `lengths`: how many new tokens each row has, an end token included.
    - `ended`: which rows have met an end token.
    - `unfinished`: whether there is a row that has not, on any device.
    - `step`: how many tokens were decoded.
    - `keys`: one a row; the draw of a step uses the row's key and the step.
    - `states`: what each of the sampler's processors remembers.
    - `stuck`: which rows' processors forbade every token; `None` without any.
    - `log_probs`: of the new tokens and of others in their place, if they are wanted.
    """

    token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    ended: Bool[Array, " batch"]
    unfinished: Bool[Array, ""]
    step: Int[Array, ""]
    keys: Key[Array, " batch"]
    states: tuple[PyTree, ...] = ()
    stuck: Bool[Array, " batch"] | None = None
    log_probs: LogProbs | None = None

    @classmethod
    def init(
        cls,
        position: Int[Array, " batch"],
        ended: Bool[Array, " batch"],
        keys: Key[Array, " batch"],
        new: int,
        states: tuple[PyTree, ...] = (),
        alternatives: int | None = None,
    ) -> "Decoding":
        """The state before the first token, with room for `new` of them.

        **Arguments:**

        - `states`: those of the sampler's processors.
        - `alternatives`: how many likeliest tokens are noted for each new one, or `None` for no log-probabilities.
        """
        none = jnp.zeros_like(position)
        return cls(
            token=none,
            position=position,
            tokens=jnp.zeros((none.shape[0], new), jnp.int32),
            lengths=none,
            ended=ended,
            unfinished=jnp.ones((), bool),
            step=jnp.zeros((), jnp.int32),
            keys=keys,
            states=states,
            stuck=jnp.zeros_like(ended) if states else None,
            log_probs=None if alternatives is None else LogProbs.init(none.shape[0], new, alternatives),
        )

    def next(self, logits: Array, sampler: Sampler, ends: Int[Array, " ends"], strategy: Strategy) -> "Decoding":
        """Chooses one token a row by its logits, and adds it."""
        processed = sampler.process(logits, self.states, strategy)
        keys = jax.vmap(jr.fold_in, in_axes=(0, None))(self.keys, self.step)
        after = self.append(sampler(processed, keys, strategy), ends, strategy)
        if self.log_probs is not None:
            log_probs = self.log_probs.record(logits, after.token, self.step, strategy)
            after = dataclasses.replace(after, log_probs=log_probs)
        if self.states:
            processors = zip(sampler.processors, self.states, strict=True)
            states = tuple(processor.next_state(state, after.token, strategy) for processor, state in processors)
            stuck = ~self.ended & (pmax(jnp.max(processed, axis=1), "vocab", strategy) == -jnp.inf)
            # There is nothing to go on with: all devices leave the loop, and `Request` says why.
            lost = pmax(jnp.any(stuck).astype(jnp.int32), "batch", strategy) > 0
            after = dataclasses.replace(after, states=states, stuck=stuck, unfinished=after.unfinished & ~lost)
        return after

    def append(self, token: Int[Array, " batch"], ends: Int[Array, " ends"], strategy: Strategy) -> "Decoding":
        """Adds one token a row; a row that has ended gets its end token again, and its length stays."""
        token = jnp.where(self.ended, self.token, token)
        ended = self.ended | jnp.any(token[:, None] == ends[None, :], axis=1)
        return Decoding(
            token=token,
            position=self.position + 1,
            tokens=lax.dynamic_update_slice_in_dim(self.tokens, token[:, None], self.step, axis=1),
            lengths=jnp.where(self.ended, self.lengths, self.step + 1),
            ended=ended,
            # All devices leave the loop together, also those whose own rows have ended.
            unfinished=pmax(jnp.any(~ended).astype(jnp.int32), "batch", strategy) > 0,
            step=self.step + 1,
            keys=self.keys,
            states=self.states,
            stuck=self.stuck,
            log_probs=self.log_probs,
        )

    def grow(self, new: int) -> "Decoding":
        """The same with room for `new` tokens."""
        tokens = jnp.pad(self.tokens, ((0, 0), (0, new - self.tokens.shape[1])))
        log_probs = None if self.log_probs is None else self.log_probs.grow(new)
        return dataclasses.replace(self, tokens=tokens, log_probs=log_probs)


class Generated(NamedTuple):
    """What [`mistral_eqx.generate`][] returns.

    **Attributes:**

    - `tokens`: new token ids; a row that ended early repeats its last token.
    - `lengths`: how many of them count, the end token included.
    - `texts`: the text of each row, without the stop string that ended it; if there was a tokenizer.
    - `log_probs`: the logarithm of each token's probability; 0 past a row's length. If `logprobs` was given.
    - `top_tokens`, `top_log_probs`: the likeliest tokens in its place, likeliest first.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    texts: list[str] | None = None
    log_probs: Float[Array, "batch new"] | None = None
    top_tokens: Int[Array, "batch new top"] | None = None
    top_log_probs: Float[Array, "batch new top"] | None = None


@eqx.filter_jit(donate="all-except-first")
def prefill(
    kept: tuple[Mistral, Int[Array, "batch seq"], Int[Array, "batch seq"]], cache: Cache
) -> tuple[Array, Cache]:
    """Reads tokens into the cache.

    **Arguments:**

    - `kept`: the model, token ids and their positions (-1 for padding).
    - `cache`: donated; it must have as many free slots as there are columns of ids.

    **Returns:** the logits after the last column, shape `(batch, vocab)`, and the cache.
    """
    model, ids, positions = kept

    def forward(model: Mistral, ids: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
        hidden, cache = model.hidden(ids, positions, cache)
        return model.logits(hidden[:, -1:])[:, 0], cache

    strategy = model.strategy
    rows, layers = strategy.spec("batch"), specs(cache, strategy)
    in_specs, out_specs = (specs(model, strategy), rows, rows, layers), (strategy.spec("batch vocab"), layers)
    return spmd(forward, model.mesh, in_specs, out_specs)(model, ids, positions, cache)


@eqx.filter_jit
def _first(
    model: Mistral,
    logits: Array,
    positions: Int[Array, " batch"],
    keys: Key[Array, " batch"],
    ended: Bool[Array, " batch"],
    sampler: Sampler,
    ends: Int[Array | np.ndarray, " ends"],
    new: int,
    states: tuple[PyTree, ...] = (),
    alternatives: int | None = None,
) -> Decoding:
    """The state after the first token of rows whose last token stands at `positions`; several may share logits."""
    strategy, decoding = model.strategy, Decoding.init(positions, ended, keys, new, states, alternatives)

    def append(logits: Array, decoding: Decoding, sampler: Sampler, ends: Array) -> Decoding:
        samples = decoding.token.shape[0] // logits.shape[0]
        return decoding.next(_repeated(logits, samples), sampler, ends, strategy)

    state = specs(decoding, strategy)
    in_specs = strategy.spec("batch vocab"), state, specs(sampler, strategy), strategy.spec("")
    return spmd(append, model.mesh, in_specs, state)(logits, decoding, sampler, ends)


@eqx.filter_jit(donate="all-except-first")
def decode(
    kept: tuple[Mistral, Decoding, Sampler, Int[Array | np.ndarray, " ends"], Int[Array | np.ndarray, ""]], cache: Cache
) -> tuple[Decoding, Cache]:
    """Decodes in one loop, until `until` tokens are there or all rows have ended.

    **Arguments:**

    - `kept`: the model, the state so far, the sampler, the end tokens, and `until`, a number of new tokens.
    - `cache`: donated, and updated in place.

    **Returns:** the state and the cache after the last token.
    """
    model, decoding, sampler, ends, until = kept
    strategy = model.strategy

    def loop(
        model: Mistral, decoding: Decoding, sampler: Sampler, ends: Array, until: Array, cache: Cache
    ) -> tuple[Decoding, Cache]:
        def unfinished(carry):
            decoding, _ = carry
            return (decoding.step < until) & decoding.unfinished

        def next_token(carry):
            decoding, cache = carry
            hidden, cache = model.hidden(decoding.token[:, None], decoding.position[:, None], cache)
            logits = model.logits(hidden)[:, 0]
            return decoding.next(logits, sampler, ends, strategy), cache

        return lax.while_loop(unfinished, next_token, (decoding, cache))

    state, layers, whole = specs(decoding, strategy), specs(cache, strategy), strategy.spec("")
    in_specs = specs(model, strategy), state, specs(sampler, strategy), whole, whole, layers
    return spmd(loop, model.mesh, in_specs, (state, layers))(model, decoding, sampler, ends, until, cache)


def empty_cache(model: Mistral, batch: int, kv_seq: int, piece: int | None = None) -> Cache:
    """A cache for a model, split over the model's devices as it is.

    **Arguments:** as for [`mistral_eqx.nn.Cache`][].
    """
    shares = parts(model, "kv_seq")
    return _init_cache(model.config, batch, kv_seq, model.dtype, piece, shares, model.mesh, model.strategy)()


@functools.lru_cache
def _init_cache(
    config: MistralConfig,
    batch: int,
    kv_seq: int,
    dtype: jnp.dtype,
    piece: int | None,
    shares: int,
    mesh: Mesh | None,
    strategy: Strategy,
) -> Callable[[], Cache]:
    platform = None if mesh is None else mesh.devices.flat[0].platform
    init = functools.partial(Cache.init, config, batch, kv_seq, dtype, platform=platform, piece=piece, shares=shares)
    if mesh is None:
        return init
    split = specs(eqx.filter_eval_shape(init), strategy)
    return jax.jit(init, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), split))


@eqx.filter_jit
def grow(model: Mistral, cache: Cache, kv_seq: int, times: int = 1) -> Cache:
    """A copy of a model's cache with `kv_seq` slots; each device adds its share to its own part.

    **Arguments:**

    - `times`: how often each row stands in it, one copy after the other.
    """
    split = specs(cache, model.strategy)
    share = kv_seq // parts(model, "kv_seq")

    def copy(cache: Cache) -> Cache:
        # Nothing of the result is the argument itself: one of them will be given away.
        cache = jax.tree.map(jnp.copy, cache.grow(share))
        layers, positions = jax.tree.map(lambda x: _repeated(x, times), (cache.layers, cache.positions))
        return Cache(layers, positions, cache.used)

    return spmd(copy, model.mesh, (split,), split)(cache)


def _repeated(x: Array, times: int) -> Array:
    return x if times == 1 else jnp.repeat(x, times, axis=0)


@eqx.filter_jit
def _grow_state(model: Mistral, decoding: Decoding, new: int) -> Decoding:
    split = specs(decoding, model.strategy)
    return spmd(lambda decoding: decoding.grow(new), model.mesh, (split,), split)(decoding)


def slots(model: Mistral, count: int) -> int:
    """The size of a cache for `count` tokens of this model.

    Where `kv_seq` is split, each device has the same share, and a slot more that a token of another one may touch.
    Shares are multiples of 8, the rows of a tile on TPUs: else the cache would be laid out anew at each call.
    """
    shares = parts(model, "kv_seq")
    if shares == 1:
        return count
    share = -(-count // shares) + 1
    return -(-share // 8) * 8 * shares


def holds(model: Mistral, kv_seq: int) -> int:
    """How many tokens a cache of this size has room for: the inverse of `slots`."""
    shares = parts(model, "kv_seq")
    return kv_seq if shares == 1 else kv_seq - shares


def _rows(model: Mistral, x: np.ndarray | Array) -> Array:
    """Puts something of each row where the model's devices have that row."""
    mesh = model.mesh
    return jnp.asarray(x) if mesh is None else place_on(np.asarray(x), mesh, model.strategy.spec("batch"))


def parts(model: Mistral, dim: str) -> int:
    """Into how many parts a dimension is split."""
    axes = model.strategy.split_over(dim)
    return 1 if model.mesh is None else math.prod(model.mesh.shape[axis] for axis in axes)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The beginning of many texts, read once: what [`mistral_eqx.prefill`][] returns.

    **Attributes:**

    - `ids`: its tokens.
    - `model`: which read it.
    - `cache`: their keys and values, in one row on each of the devices among which `batch` is split.
    """

    ids: tuple[int, ...]
    model: Mistral
    cache: Cache


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked call of `generate` or `stream`: what every decoding step needs besides its state.

    **Attributes:**

    - `ends`: the tokens that end a row.
    - `keys`: one a row, the idle ones included, as all that is kept for each row.
    - `idle`: how many rows are added to the prompts' so that `batch` can be split; they have ended from the start.
    - `samples`: how many rows follow each prompt.
    - `states`: the first states of the sampler's processors.
    - `alternatives`: how many likeliest tokens are noted at each new one; `None` for no log-probabilities.
    - `prefix`: with which all prompts begin.
    - `chunk`: the most tokens that are read at a time.
    """

    model: Mistral
    sampler: Sampler
    ends: Int[np.ndarray, " ends"]
    keys: Key[Array, " batch"]
    max_new_tokens: int
    idle: int
    samples: int = 1
    states: tuple[PyTree, ...] = ()
    alternatives: int | None = None
    prefix: Prefix | None = None
    chunk: int = CHUNK

    @classmethod
    def init(
        cls,
        model: Mistral,
        rows: list[list[int]],
        max_new_tokens: int,
        sampler: Sampler,
        eos_id: int | Sequence[int] | None,
        key: Key[Array, "..."] | None,
        *,
        num_samples: int = 1,
        logprobs: int | None = None,
        prefix: Prefix | None = None,
        prefill_chunk: int = CHUNK,
    ) -> "Request":
        """Checks the arguments of `generate`.

        **Raises:** `ValueError` as `generate` says.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        vocab = model.config.vocab
        before = [] if prefix is None else checked_prefix(prefix, model)
        check_context(len(before) + max(map(len, rows)), max_new_tokens, model.config.max_positions)
        check_chunk(prefill_chunk)
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; it must be at least 1.")
        if num_samples > 1 and sampler.greedy:
            raise ValueError(
                f"num_samples is {num_samples}, but without drawing all samples of a prompt are the same; give a "
                "temperature."
            )
        if logprobs is not None and not 0 <= logprobs <= vocab:
            raise ValueError(f"logprobs is {logprobs}; it must be from 0 to the vocabulary's {vocab}.")
        idle = -len(rows) % parts(model, "batch")
        keys = _row_keys(key, sampler, len(rows), idle, num_samples)
        ends = [] if eos_id is None else list(eos_id) if isinstance(eos_id, Iterable) else [eos_id]
        for end in ends:
            if not 0 <= end < vocab:
                raise ValueError(
                    f"The end token {end} is outside the vocabulary of {vocab}; leave out eos_id if "
                    "nothing is to stop early."
                )
        texts = [[*before, *row] for row in (*rows, *rows[:1] * idle) for _ in range(num_samples)]
        states = tuple(processor.init_state(texts, ends, vocab) for processor in sampler.processors)
        return cls(
            model=model,
            sampler=_placed(model, sampler),
            ends=np.asarray(ends, np.int32),
            keys=jr.wrap_key_data(_rows(model, jr.key_data(keys)), impl=jr.key_impl(keys)),
            max_new_tokens=max_new_tokens,
            idle=idle,
            samples=num_samples,
            states=_placed(model, states),
            alternatives=logprobs,
            prefix=prefix,
            chunk=prefill_chunk,
        )

    def start(self, rows: list[list[int]], *, forgets: bool = True) -> tuple[Decoding, Cache]:
        """Reads the prompts into a new cache with room for new tokens, and decodes the first of these.

        **Arguments:**

        - `forgets`: whether layers with a window keep what the window reaches and no more. A cache to which padded
            texts are added, or from which tokens are taken away, must not.
        """
        prefix, width = self.prefix, prompt_width(max(map(len, rows)))
        # Attention reads all of a cache: while the prompt is read, it has no slots besides the prompt's.
        if prefix is None:
            ids, positions = pad_left(rows, width)
            piece = min(self.chunk, width) if forgets else None
            cache = empty_cache(self.model, len(rows) + self.idle, slots(self.model, width), piece)
        else:
            ids, positions = pad_left(rows, width, starts=[len(prefix.ids)] * len(rows))
            room = slots(self.model, int(prefix.cache.used) + width)
            copies = (len(rows) + self.idle) // parts(self.model, "batch")
            cache = grow(self.model, prefix.cache, max(room, prefix.cache.kv_seq), copies)
        return self.read(ids, positions, cache)

    def read(
        self, ids: Int[np.ndarray, "rows seq"], positions: Int[np.ndarray, "rows seq"], cache: Cache
    ) -> tuple[Decoding, Cache]:
        """Reads tokens into a cache in pieces, makes room for new ones, and decodes the first of these."""
        ended = np.arange(len(ids) + self.idle) >= len(ids)
        ids, positions = (np.concatenate([x, *[x[:1]] * self.idle]) for x in (ids, positions))
        logits, cache = read_pieces(self.model, ids, positions, cache, self.chunk)
        room = slots(self.model, capacity(int(cache.used) + first_room(self.max_new_tokens)))
        if room > cache.kv_seq or self.samples > 1:
            cache = grow(self.model, cache, max(room, cache.kv_seq), self.samples)
        # The last column holds each row's last token.
        at, ended = (_rows(self.model, np.repeat(x, self.samples)) for x in (positions[:, -1], ended))
        decoding = _first(
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

    def decode(self, decoding: Decoding, cache: Cache, until: int) -> tuple[Decoding, Cache]:
        """Decodes until there are `until` new tokens, or all rows have ended.

        A cache that is full is replaced by one of at most twice its size, for which another loop is compiled.
        """
        while decoding.unfinished and (step := int(decoding.step)) < until:
            used, room = int(cache.used), holds(self.model, cache.kv_seq)
            if used == room:
                room = min(2 * room, capacity(used + self.max_new_tokens - step))
                cache = grow(self.model, cache, slots(self.model, room))
                decoding = _grow_state(self.model, decoding, cache.kv_seq)
            # The last token is not in the cache yet, so each slot gives one more.
            target = np.asarray(min(until, step + room - used), np.int32)
            decoding, cache = decode((self.model, decoding, self.sampler, self.ends, target), cache)
            self._check(decoding)
        return decoding, cache

    def steps(
        self, decoding: Decoding, cache: Cache, size: int, stops: Stops | None = None
    ) -> Iterator[tuple[Decoding, Cache]]:
        """The state and the cache after the first token, and after each `size` more of them.

        **Arguments:**

        - `stops`: looks for stop strings each time; a row that has one has ended.
        """
        while True:
            if stops is not None:
                decoding = self._stop(decoding, stops)
            yield decoding, cache
            if not decoding.unfinished or int(decoding.step) >= self.max_new_tokens:
                return
            until = min(int(decoding.step) + size, self.max_new_tokens)
            decoding, cache = self.decode(decoding, cache, until)

    def _stop(self, decoding: Decoding, stops: Stops) -> Decoding:
        rows = len(stops.lengths)
        ended = everywhere(decoding.ended).copy()
        stopped = stops.read(everywhere(decoding.tokens)[:rows], everywhere(decoding.lengths)[:rows])
        if not (stopped & ~ended[:rows]).any():
            return decoding
        ended[:rows] |= stopped
        unfinished = np.asarray(not ended.all())
        mesh = self.model.mesh
        return dataclasses.replace(
            decoding,
            ended=_rows(self.model, ended),
            unfinished=jnp.asarray(unfinished) if mesh is None else place_on(unfinished, mesh, PartitionSpec()),
        )

    def _check(self, decoding: Decoding):
        if decoding.stuck is None:
            return
        if (stuck := everywhere(decoding.stuck)).any():
            row, new = int(np.argmax(stuck)), int(decoding.step) - 1
            raise ValueError(
                f"The processors forbid every token to row {row} after {new} new ones; let them allow at least one, "
                "such as an end token."
            )


def _row_keys(
    key: Key[Array, "..."] | None, sampler: Sampler, batch: int, idle: int, samples: int
) -> Key[Array, " rows"]:
    """One key for each row, by what the user gave."""
    if key is None:
        if not sampler.greedy:
            raise ValueError("Sampling draws random numbers; give a key, such as key=jax.random.key(0).")
        key = jr.key(0)
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ValueError("The key must be one that jax.random.key made, such as key=jax.random.key(0).")
    fold = jax.vmap(jr.fold_in, in_axes=(None, 0))
    if key.ndim == 0:
        return fold(key, jnp.arange((batch + idle) * samples))
    if key.shape != (batch,):
        raise ValueError(f"There are {batch} prompts and keys of shape {key.shape}; give one key, or one a prompt.")
    if samples > 1:
        key = jax.vmap(fold, in_axes=(0, None))(key, jnp.arange(samples)).reshape(-1)
    return jnp.concatenate([key, *[key[:1]] * (idle * samples)])


def _placed(model: Mistral, tree: PyTree) -> PyTree:
    """Arrays of modules where the model's devices have them; numpy arrays are sent with each call."""
    mesh = model.mesh
    if mesh is None:
        return tree
    arrays, others = eqx.partition(tree, eqx.is_array)
    placed = jax.tree.map(lambda x, spec: place_on(np.asarray(x), mesh, spec), arrays, specs(arrays, model.strategy))
    return eqx.combine(placed, others)


def read_pieces(
    model: Mistral, ids: Int[np.ndarray, "rows seq"], positions: Int[np.ndarray, "rows seq"], cache: Cache, chunk: int
) -> tuple[Array, Cache]:
    """Reads tokens into a cache, at most `chunk` columns at a time, and returns the last logits and the cache."""
    *earlier, last = (slice(start, start + chunk) for start in range(0, ids.shape[1], chunk))
    for piece in earlier:
        _, cache = prefill((model, _rows(model, ids[:, piece]), _rows(model, positions[:, piece])), cache)
    return prefill((model, _rows(model, ids[:, last]), _rows(model, positions[:, last])), cache)


def checked_prefix(prefix: Prefix, model: Mistral) -> tuple[int, ...]:
    """The tokens of a prefix.

    **Raises:** `ValueError` if another model read it.
    """
    if prefix.model is not model:
        raise ValueError("The prefix was read by another model; read it again with this one, by mistral_eqx.prefill.")
    return prefix.ids


def check_chunk(chunk: int):
    """Refuses pieces without a token.

    **Raises:** `ValueError` if there are none.
    """
    if chunk < 1:
        raise ValueError(f"A prompt cannot be read in pieces of {chunk} tokens; give at least 1.")


def check_context(longest: int, max_new_tokens: int, context: int):
    """Refuses prompts of at most `longest` tokens that do not fit into the context with their new tokens.

    **Raises:** `ValueError` that tells the three numbers.
    """
    if longest + max_new_tokens > context:
        raise ValueError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones are more than this model's context of "
            f"{context} tokens; shorten the prompt or ask for fewer new tokens."
        )


def prompt_width(longest: int) -> int:
    """The number of columns in which prompts of at most `longest` tokens are read.

    Less than an eighth of them, or less than 16, are padding.
    """
    return bucket(longest, step=16, per_octave=8)


def first_room(max_new_tokens: int) -> int:
    """For how many of the new tokens a cache has room at first: attention reads all of it in each step."""
    return min(max_new_tokens, 128)


def capacity(slots: int) -> int:
    """The size of a cache that holds `slots`: at most two in each octave, so that few loops are compiled."""
    return bucket(slots, step=128, per_octave=2)


def generate(
    model: Mistral,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_id: int | Sequence[int] | None = None,
    key: Key[Array, "..."] | None = None,
    stop: str | Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    num_samples: int = 1,
    logprobs: int | None = None,
    prefix: Prefix | None = None,
    prefill_chunk: int = CHUNK,
) -> Generated:
    """Continues each prompt, in one compiled loop.

    ```python
    out = mx.generate(model, [tokenizer.encode("The capital of France is")], max_new_tokens=32)
    print(tokenizer.decode(out.tokens[0, : out.lengths[0]].tolist()))
    ```

    Each row gives the tokens that it would give alone, whatever its neighbours' lengths.

    **Arguments:**

    - `model`: the model.
    - `prompts`: lists of token ids, of any lengths, or an array of shape `(batch, seq)`, in which -1 on either side is
        padding.
    - `max_new_tokens`: how many tokens to add to each.
    - `sampler`: how a token is chosen; greedy unless given.
    - `eos_id`: the token, or the tokens, that end a row. Without any, nothing stops early.
    - `key`: for samplers that draw: one key, from which each row gets its own, or an array with one key a prompt.
    - `stop`: strings that end a row where they are complete in its new text, wherever in a token that is.
    - `tokenizer`: makes text of the new tokens; needed for `stop`.
    - `num_samples`: how many continuations to draw of each prompt, which is read once; they are neighbours in the
        result.
    - `logprobs`: how many likeliest tokens to report at each new one with their log-probabilities; 0 for those of the
        chosen ones only. They are the model's own, before the sampler.
    - `prefix`: from [`mistral_eqx.prefill`][]; the prompts are what follows it.
    - `prefill_chunk`: prompts are read in pieces of at most this many tokens; smaller ones take less memory.

    **Returns:** [`mistral_eqx.Generated`][], with `tokens` of shape `(batch * num_samples, max_new_tokens)` and
    `lengths` of shape `(batch * num_samples,)`.

    **Raises:** `ValueError` if a prompt is empty, has an id outside the vocabulary, or does not fit into the context
    with its new tokens; if an end token is outside the vocabulary; if a sampler draws and there is no key; if a stop
    string is empty or there is no tokenizer for it; if a processor does not fit the vocabulary or forbids every token.
    """
    rows = checked_prompts(prompts, model.config.vocab)
    request = Request.init(
        model,
        rows,
        max_new_tokens,
        sampler or Sampler(),
        eos_id,
        key,
        num_samples=num_samples,
        logprobs=logprobs,
        prefix=prefix,
        prefill_chunk=prefill_chunk,
    )
    count = len(rows) * num_samples
    stops = stop_rows(stop, tokenizer, count)
    size = max_new_tokens if stops is None else _PIECE
    decoding, _ = collections.deque(request.steps(*request.start(rows), size, stops), maxlen=1).pop()
    lengths = everywhere(decoding.lengths)[:count]
    if stops is not None:
        lengths = np.where(stops.lengths < 0, lengths, stops.lengths).astype(np.int32)
    columns = np.minimum(np.arange(max_new_tokens), lengths[:, None] - 1)
    tokens = np.take_along_axis(everywhere(decoding.tokens)[:count], columns, axis=1)
    texts = None
    if stops is not None:
        texts = stops.flush()
    elif tokenizer is not None:
        texts = [tokenizer.decode(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
    out = Generated(jnp.asarray(tokens), jnp.asarray(lengths), texts)
    if decoding.log_probs is None:
        return out
    past = np.arange(max_new_tokens) >= lengths[:, None]
    chosen, top_tokens, top = (
        everywhere(x)[:count] for x in (decoding.log_probs.chosen, decoding.log_probs.tokens, decoding.log_probs.top)
    )
    return out._replace(
        log_probs=jnp.asarray(np.where(past, 0, np.take_along_axis(chosen, columns, axis=1))),
        top_tokens=jnp.asarray(
            np.where(past[..., None], 0, np.take_along_axis(top_tokens, columns[..., None], axis=1))
        ),
        top_log_probs=jnp.asarray(np.where(past[..., None], 0, np.take_along_axis(top, columns[..., None], axis=1))),
    )
