"""Proposed tokens for speculative decoding: from the sequence itself, or from a smaller model."""

import dataclasses
import functools
from typing import Annotated, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
from annotated_types import Ge, Le
from jax import lax
from jaxtyping import Array, Int

from ..checks import Count, NotNegative, check_fields, checked
from ..errors import InputError
from ..nn import Cache, Mistral
from .flat import Flat
from .loop import Decoding
from .sampler import Sampler


# A cache has room for more at any time.
_Tokens = Annotated[int, Ge(1), Le(64)]


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Proposes what followed the latest earlier occurrence of the last n-gram of a row's own sequence, prompt and new
    tokens ([prompt lookup decoding](https://github.com/apoorvumang/prompt-lookup-decoding)).

    **Attributes:**

    - `tokens`: how many tokens to propose at a time, at most 64.
    - `ngram`: how many last tokens must occur before.
    - `cost`: the time of a pass over proposals in steps without speculation; measured unless given. Below so many new
        tokens a pass, speculation pauses; 0 never pauses, and proposes something in each pass.
    """

    tokens: _Tokens = 7
    ngram: Count = 3
    cost: NotNegative | None = None

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """Proposes what a smaller model of the same tokenizer chooses.

    **Attributes:**

    - `model`: the draft, on the devices of the model; another strategy may split it, but for `batch`. A
        [`mistral_eqx.Engine`][] needs the strategy of the model.
    - `tokens`: how many tokens to propose at a time, at most 64.
    - `cost`: as in [`mistral_eqx.PromptLookup`][], the draft's own time included. A draft that costs more than it gives
        is off for the rest of the call; in an engine it pauses.
    """

    model: Mistral
    tokens: _Tokens = 4
    cost: NotNegative | None = None

    def __post_init__(self):
        check_fields(self)

    @functools.cached_property
    def flat(self) -> Flat:
        """The draft, as the compiled loop takes it."""
        return Flat(self.model)


Speculate: TypeAlias = PromptLookup | Draft


def checked_speculate(speculate: Speculate | None, model: Mistral) -> Speculate | None:
    """Checks that proposals can be for a model.

    **Raises:** `ValueError` if a draft has another vocabulary, or is on other devices.
    """
    remedy = "such as mistral_eqx.PromptLookup()"
    checked(speculate, PromptLookup | Draft | None, "speculate", remedy=remedy)
    if not isinstance(speculate, Draft):
        return speculate
    draft = speculate.model
    check_vocabulary(draft.config.vocab, model.config.vocab)
    if draft.mesh != model.mesh:
        raise InputError(
            "The draft is on other devices than the model; shard both over the same mesh, by mistral_eqx.shard."
        )
    if draft.strategy.axes("batch") != model.strategy.axes("batch"):
        raise InputError(
            f"The draft's strategy {draft.strategy.layout!r} splits 'batch' over other axes than the model's "
            f"{model.strategy.layout!r}; split it over the same ones."
        )
    return speculate


def check_vocabulary(draft: int, model: int):
    """Refuses a draft with another number of tokens than the model.

    **Raises:** `ValueError` that has both.
    """
    if draft != model:
        raise InputError(
            f"The draft has a vocabulary of {draft} tokens and the model one of {model}; a draft must have the model's "
            "tokenizer."
        )


def look_up(
    text: Int[Array, "batch text"], position: Int[Array, " batch"], tokens: int, ngram: int
) -> Int[Array, "batch tokens"]:
    """What followed the latest earlier occurrence of the last n-gram of each row.

    If fewer than `tokens` tokens follow it, they are repeated: the sequence has that period so far.

    **Arguments:**

    - `text`: the token at each position of the row's sequence.
    - `position`: that of the last token.

    **Returns:** proposed tokens, -1 in a row whose last n-gram is new.
    """
    columns, last = jnp.arange(text.shape[1], dtype=jnp.int32)[None], position[:, None]
    occurs = (columns < last) & (columns >= ngram - 1)
    for back in range(ngram):
        wanted = jnp.take_along_axis(text, jnp.maximum(last - back, 0), axis=1)
        occurs &= jnp.pad(text, ((0, 0), (back, 0)))[:, : text.shape[1]] == wanted
    latest = jnp.max(jnp.where(occurs, columns, -1), axis=1, keepdims=True)
    following = latest + 1 + jnp.arange(tokens, dtype=jnp.int32)[None] % (last - latest)
    return jnp.where(latest < 0, -1, jnp.take_along_axis(text, following, axis=1))


def draft_tokens(
    draft: Mistral,
    cache: Cache,
    decoding: Decoding,
    text: Int[Array, "batch text"],
    sampler: Sampler,
    tokens: int,
) -> tuple[Int[Array, "batch tokens"], Cache]:
    """What a draft chooses, with the random numbers with which the model will choose.

    **Arguments:**

    - `draft`, `cache`: the draft and its cache, in which at most the last two tokens are missing.
    - `decoding`, `text`: as for `look_up` and the loop.
    - `sampler`: without its processors, whose states belong to the model.
    - `tokens`: how many to propose.

    **Returns:** the tokens, and the cache with all but the last of them.
    """
    strategy, position, active = draft.strategy, decoding.position, ~decoding.ended

    def choose(hidden: Array, number: Array | int) -> Array:
        logits = draft.logits(hidden[:, -1:])[:, 0]
        keys = jax.vmap(jr.fold_in)(decoding.keys, decoding.lengths + number)
        return sampler.choose(logits, keys, strategy)[0]

    # After a pass whose proposals were all accepted, the last of them is missing. The token before the last is written
    # again in any case: that costs no slot and hardly any time.
    before = jnp.take_along_axis(text, jnp.maximum(position - 1, 0)[:, None], axis=1)
    pair, at = jnp.stack([before[:, 0], decoding.token], axis=1), jnp.stack([position - 1, position], axis=1)
    cache = Cache(cache.layers, cache.keep(position - 1).positions, cache.used - 1)
    hidden, cache = draft.hidden(pair, jnp.where(active[:, None], at, -1), cache)
    first = choose(hidden, 0)

    def next_token(carry: tuple[Array, Cache], number: Array) -> tuple[tuple[Array, Cache], Array]:
        token, cache = carry
        at = jnp.where(active, position + number, -1)
        hidden, cache = draft.hidden(token[:, None], at[:, None], cache)
        token = choose(hidden, number)
        return (token, cache), token

    (_, cache), others = lax.scan(next_token, (first, cache), jnp.arange(1, tokens, dtype=jnp.int32))
    return jnp.concatenate([first[:, None], others.T], axis=1), cache
