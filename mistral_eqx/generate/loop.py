"""Decoding: one compiled `lax.while_loop`."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from ..nn import Cache, Mistral
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
    - `step`: how many tokens were decoded.
    - `keys`: one a row; the draw of a step uses the row's key and the step.
    """

    token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    ended: Bool[Array, " batch"]
    step: Int[Array, ""]
    keys: Key[Array, " batch"]

    def append(self, token: Int[Array, " batch"], ends: Int[Array, " ends"]) -> "Decoding":
        """Adds one token a row; a row that has ended gets its end token again, and its length stays."""
        token = jnp.where(self.ended, self.token, token)
        return Decoding(
            token=token,
            position=self.position + 1,
            tokens=lax.dynamic_update_slice_in_dim(self.tokens, token[:, None], self.step, axis=1),
            lengths=jnp.where(self.ended, self.lengths, self.step + 1),
            ended=self.ended | jnp.any(token[:, None] == ends[None, :], axis=1),
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
    hidden, cache = model.hidden(ids, positions, cache)
    return model.logits(hidden[:, -1:])[:, 0], cache


@eqx.filter_jit
def _first(
    logits: Array, cache: Cache, keys: Key[Array, " batch"], sampler: Sampler, ends: Int[Array, " ends"], new: int
) -> Decoding:
    batch = logits.shape[0]
    none = jnp.zeros(batch, jnp.int32)
    decoding = Decoding(
        token=none,
        position=cache.next_positions - 1,
        tokens=jnp.zeros((batch, new), jnp.int32),
        lengths=none,
        ended=jnp.zeros(batch, bool),
        step=jnp.zeros((), jnp.int32),
        keys=keys,
    )
    return decoding.append(_draw(sampler, logits, decoding), ends)


@eqx.filter_jit(donate="all-except-first")
def decode(
    kept: tuple[Mistral, Decoding, Sampler, Int[Array, " ends"], Int[Array, ""]], cache: Cache
) -> tuple[Decoding, Cache]:
    """Decodes in one loop, until `until` tokens are there or all rows have ended.

    **Arguments:**

    - `kept`: the model, the state so far, the sampler, the end tokens, and `until`, a number of new tokens.
    - `cache`: donated, and updated in place.

    **Returns:** the state and the cache after the last token.
    """
    model, decoding, sampler, ends, until = kept

    def unfinished(carry):
        decoding, _ = carry
        return (decoding.step < until) & ~jnp.all(decoding.ended)

    def next_token(carry):
        decoding, cache = carry
        hidden, cache = model.hidden(decoding.token[:, None], decoding.position[:, None], cache)
        logits = model.logits(hidden)[:, 0]
        return decoding.append(_draw(sampler, logits, decoding), ends), cache

    return lax.while_loop(unfinished, next_token, (decoding, cache))


def _draw(sampler: Sampler, logits: Array, decoding: Decoding) -> Int[Array, " batch"]:
    keys = jax.vmap(jr.fold_in, in_axes=(0, None))(decoding.keys, decoding.step)
    return sampler(logits, keys)


_grow = eqx.filter_jit(Cache.grow)


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked call of `generate` or `stream`: what every decoding step needs besides its state."""

    model: Mistral
    sampler: Sampler
    ends: Int[Array, " ends"]
    keys: Key[Array, " batch"]
    max_new_tokens: int

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
        if key.ndim == 0:
            key = jax.vmap(jr.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
        elif key.shape != (batch,):
            raise ValueError(f"There are {batch} prompts and keys of shape {key.shape}; give one key, or one a prompt.")
        ends = [] if eos_id is None else list(eos_id) if isinstance(eos_id, Iterable) else [eos_id]
        for end in ends:
            if not 0 <= end < model.config.vocab:
                raise ValueError(
                    f"The end token {end} is outside the vocabulary of {model.config.vocab}; leave out eos_id if "
                    "nothing is to stop early."
                )
        return cls(model, sampler, jnp.asarray(ends, jnp.int32), key, max_new_tokens)

    def start(self, rows: list[list[int]]) -> tuple[Decoding, Cache]:
        """Reads the prompts into a new cache with room for all new tokens, and decodes the first token."""
        ids, positions = pad_left(rows, prompt_width(max(map(len, rows))))
        # Attention reads all of a cache: while the prompt is read, it has no slots besides the prompt's.
        cache = Cache.init(self.model.config, ids.shape[0], ids.shape[1], self.model.dtype)
        return self.read(ids, positions, cache)

    def read(
        self, ids: Int[Array, "batch seq"], positions: Int[Array, "batch seq"], cache: Cache
    ) -> tuple[Decoding, Cache]:
        """Reads tokens into a cache in pieces, makes room for all new tokens, and decodes the first of them."""
        *earlier, last = (slice(start, start + _CHUNK) for start in range(0, ids.shape[1], _CHUNK))
        for piece in earlier:
            _, cache = prefill((self.model, ids[:, piece], positions[:, piece]), cache)
        logits, cache = prefill((self.model, ids[:, last], positions[:, last]), cache)
        slots = capacity(int(cache.used) + self.max_new_tokens)
        if slots > cache.kv_seq:
            cache = _grow(cache, slots)
        return _first(logits, cache, self.keys, self.sampler, self.ends, cache.kv_seq), cache

    def decode(self, decoding: Decoding, cache: Cache, until: int) -> tuple[Decoding, Cache]:
        """Decodes until there are `until` new tokens, or all rows have ended."""
        kept = (self.model, decoding, self.sampler, self.ends, jnp.asarray(until, jnp.int32))
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
    columns = jnp.arange(max_new_tokens)[None, :]
    tokens = jnp.where(columns < decoding.step, decoding.tokens[:, :max_new_tokens], decoding.token[:, None])
    return Generated(tokens, decoding.lengths)
