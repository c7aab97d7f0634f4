"""Decoding: one compiled `lax.while_loop`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int, Key

from ..config import MistralConfig
from ..nn import Cache, Mistral
from ..parallel import Strategy, everywhere, place_on, pmax, specs, spmd
from .prompt import Prompts, bucket, checked_prompts, pad_left
from .sampler import Sampler


# A prompt is read in pieces of at most this many tokens: scores then take memory for this many queries at a time.
_CHUNK = 512


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
    """

    token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    ended: Bool[Array, " batch"]
    unfinished: Bool[Array, ""]
    step: Int[Array, ""]
    keys: Key[Array, " batch"]

    @classmethod
    def init(
        cls, position: Int[Array, " batch"], ended: Bool[Array, " batch"], keys: Key[Array, " batch"], new: int
    ) -> "Decoding":
        """The state before the first token, with room for `new` of them."""
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
        )

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
        )


class Generated(NamedTuple):
    """What [`mistral_eqx.generate`][] returns.

    **Attributes:**

    - `tokens`: new token ids; a row that ended early repeats its end token.
    - `lengths`: how many of them count, the end token included.
    """

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]


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
    ends: Int[Array, " ends"] | Int[np.ndarray, " ends"],
    new: int,
) -> Decoding:
    """The state after the first token of rows whose last token stands at `positions`."""
    strategy, decoding = model.strategy, Decoding.init(positions, ended, keys, new)

    def append(logits: Array, decoding: Decoding, sampler: Sampler, ends: Array) -> Decoding:
        return decoding.append(_draw(sampler, logits, decoding, strategy), ends, strategy)

    state = specs(decoding, strategy)
    in_specs = strategy.spec("batch vocab"), state, specs(sampler, strategy), strategy.spec("")
    return spmd(append, model.mesh, in_specs, state)(logits, decoding, sampler, ends)


@eqx.filter_jit(donate="all-except-first")
def decode(
    kept: tuple[Mistral, Decoding, Sampler, Array | np.ndarray, Array | np.ndarray], cache: Cache
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
            return decoding.append(_draw(sampler, logits, decoding, strategy), ends, strategy), cache

        return lax.while_loop(unfinished, next_token, (decoding, cache))

    state, layers, whole = specs(decoding, strategy), specs(cache, strategy), strategy.spec("")
    in_specs = specs(model, strategy), state, specs(sampler, strategy), whole, whole, layers
    return spmd(loop, model.mesh, in_specs, (state, layers))(model, decoding, sampler, ends, until, cache)


def _draw(sampler: Sampler, logits: Array, decoding: Decoding, strategy: Strategy) -> Int[Array, " batch"]:
    keys = jax.vmap(jr.fold_in, in_axes=(0, None))(decoding.keys, decoding.step)
    return sampler(logits, keys, strategy)


def empty_cache(model: Mistral, batch: int, kv_seq: int) -> Cache:
    """A cache for a model, split over the model's devices as it is."""
    return _init_cache(model.config, batch, kv_seq, model.dtype, model.mesh, model.strategy)()


@functools.lru_cache
def _init_cache(
    config: MistralConfig, batch: int, kv_seq: int, dtype: jnp.dtype, mesh: Mesh | None, strategy: Strategy
) -> Callable[[], Cache]:
    platform = None if mesh is None else mesh.devices.flat[0].platform
    init = functools.partial(Cache.init, config, batch, kv_seq, dtype, platform=platform)
    if mesh is None:
        return init
    split = specs(eqx.filter_eval_shape(init), strategy)
    return jax.jit(init, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), split))


@eqx.filter_jit
def grow(model: Mistral, cache: Cache, kv_seq: int) -> Cache:
    """A copy of a model's cache with `kv_seq` slots; each device adds its share to its own part."""
    split = specs(cache, model.strategy)
    share = kv_seq // parts(model, "kv_seq")
    return spmd(lambda cache: cache.grow(share), model.mesh, (split,), split)(cache)


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


def _rows(model: Mistral, x: np.ndarray | Array) -> Array:
    """Puts something of each row where the model's devices have that row."""
    mesh = model.mesh
    return jnp.asarray(x) if mesh is None else place_on(np.asarray(x), mesh, model.strategy.spec("batch"))


def parts(model: Mistral, dim: str) -> int:
    """Into how many parts a dimension is split."""
    axes = model.strategy.split_over(dim)
    return 1 if model.mesh is None else math.prod(model.mesh.shape[axis] for axis in axes)


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked call of `generate` or `stream`: what every decoding step needs besides its state.

    **Attributes:**

    - `idle`: how many rows are added to the prompts' so that `batch` can be split; they have ended from the start.
    """

    model: Mistral
    sampler: Sampler
    ends: Int[np.ndarray, " ends"]
    keys: Key[Array, " batch"]
    max_new_tokens: int
    idle: int

    @classmethod
    def init(
        cls,
        model: Mistral,
        rows: list[list[int]],
        max_new_tokens: int,
        sampler: Sampler,
        eos_id: int | Sequence[int] | None,
        key: Key[Array, "..."] | None,
    ) -> "Request":
        """Checks the arguments of `generate`.

        **Raises:** `ValueError` as `generate` says.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        check_context(max(map(len, rows)), max_new_tokens, model.config.max_positions)
        batch = len(rows)
        if key is None:
            if not sampler.greedy:
                raise ValueError("Sampling draws random numbers; give a key, such as key=jax.random.key(0).")
            key = jr.key(0)
        if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
            raise ValueError("The key must be one that jax.random.key made, such as key=jax.random.key(0).")
        idle = -batch % parts(model, "batch")
        if key.ndim == 0:
            key = jax.vmap(jr.fold_in, in_axes=(None, 0))(key, jnp.arange(batch + idle))
        elif key.shape == (batch,):
            key = jnp.concatenate([key, *[key[:1]] * idle])
        else:
            raise ValueError(f"There are {batch} prompts and keys of shape {key.shape}; give one key, or one a prompt.")
        ends = [] if eos_id is None else list(eos_id) if isinstance(eos_id, Iterable) else [eos_id]
        for end in ends:
            if not 0 <= end < model.config.vocab:
                raise ValueError(
                    f"The end token {end} is outside the vocabulary of {model.config.vocab}; leave out eos_id if "
                    "nothing is to stop early."
                )
        keys = jr.wrap_key_data(_rows(model, jr.key_data(key)), impl=jr.key_impl(key))
        return cls(model, sampler, np.asarray(ends, np.int32), keys, max_new_tokens, idle)

    def start(self, rows: list[list[int]]) -> tuple[Decoding, Cache]:
        """Reads the prompts into a new cache with room for all new tokens, and decodes the first token."""
        ids, positions = pad_left(rows, prompt_width(max(map(len, rows))))
        # Attention reads all of a cache: while the prompt is read, it has no slots besides the prompt's.
        cache = empty_cache(self.model, len(rows) + self.idle, slots(self.model, ids.shape[1]))
        return self.read(ids, positions, cache)

    def read(
        self, ids: Int[np.ndarray, "rows seq"], positions: Int[np.ndarray, "rows seq"], cache: Cache
    ) -> tuple[Decoding, Cache]:
        """Reads tokens into a cache in pieces, makes room for all new tokens, and decodes the first of them."""
        ended = np.arange(len(ids) + self.idle) >= len(ids)
        ids, positions = (np.concatenate([x, *[x[:1]] * self.idle]) for x in (ids, positions))
        *earlier, last = (slice(start, start + _CHUNK) for start in range(0, ids.shape[1], _CHUNK))
        for piece in earlier:
            _, cache = self._prefill(ids[:, piece], positions[:, piece], cache)
        logits, cache = self._prefill(ids[:, last], positions[:, last], cache)
        room = slots(self.model, capacity(int(cache.used) + self.max_new_tokens))
        if room > cache.kv_seq:
            cache = grow(self.model, cache, room)
        # The last column holds each row's last token.
        at, ended = _rows(self.model, positions[:, -1]), _rows(self.model, ended)
        return _first(self.model, logits, at, self.keys, ended, self.sampler, self.ends, cache.kv_seq), cache

    def _prefill(self, ids: np.ndarray, positions: np.ndarray, cache: Cache) -> tuple[Array, Cache]:
        return prefill((self.model, _rows(self.model, ids), _rows(self.model, positions)), cache)

    def decode(self, decoding: Decoding, cache: Cache, until: int) -> tuple[Decoding, Cache]:
        """Decodes until there are `until` new tokens, or all rows have ended."""
        kept = (self.model, decoding, self.sampler, self.ends, np.asarray(until, np.int32))
        return decode(kept, cache)


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
) -> Generated:
    """Continues each prompt, in one compiled loop.

    ```python
    out = mx.generate(model, [tokenizer.encode("The capital of France is")], max_new_tokens=32)
    print(tokenizer.decode(out.tokens[0, : out.lengths[0]].tolist()))
    ```

    Each row gives the tokens that it would give alone, whatever its neighbours' lengths.

    **Arguments:**

    - `model`: the model.
    - `prompts`: lists of token ids, of any lengths, or an array of shape `(batch, seq)`.
    - `max_new_tokens`: how many tokens to add to each.
    - `sampler`: how a token is chosen; greedy unless given.
    - `eos_id`: the token, or the tokens, that end a row. Without any, nothing stops early.
    - `key`: for samplers that draw: one key, from which each row gets its own, or an array with one key a row.

    **Returns:** [`mistral_eqx.Generated`][], with `tokens` of shape `(batch, max_new_tokens)` and `lengths` of shape
    `(batch,)`.

    **Raises:** `ValueError` if a prompt is empty, has an id outside the vocabulary, or does not fit into the context
    with its new tokens; if an end token is outside the vocabulary; if a sampler draws and there is no key.
    """
    rows = checked_prompts(prompts, model.config.vocab)
    request = Request.init(model, rows, max_new_tokens, sampler or Sampler(), eos_id, key)
    decoding, cache = request.start(rows)
    if max_new_tokens > 1:
        decoding, _ = request.decode(decoding, cache, max_new_tokens)
    tokens, lengths, last = (everywhere(x)[: len(rows)] for x in (decoding.tokens, decoding.lengths, decoding.token))
    # Past the step at which all rows had ended, each repeats its end token.
    tokens = np.where(np.arange(max_new_tokens) < int(decoding.step), tokens[:, :max_new_tokens], last[:, None])
    return Generated(jnp.asarray(tokens), jnp.asarray(lengths))
