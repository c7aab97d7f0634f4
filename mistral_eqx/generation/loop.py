"""Decoding: one compiled `lax.while_loop`."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ..nn import Cache, Mistral
from ..parallel import Strategy, specs, spmd
from .caches import repeated
from .finite import lost, marked, proceeds
from .flat import Flat
from .log_probs import LogProbs
from .sampler import Sampler


class Decoding(eqx.Module):
    """What the loop carries from token to token, besides the cache.

    **Attributes:**

    - `token`: the last token of each row, which is not in the cache yet.
    - `position`: that token's position in its sequence.
    - `tokens`: all new tokens so far; the column of the next one is `step`.
    - `lengths`: how many new tokens each row has, an end token included.
    - `ended`: which rows have an end token.
    - `unfinished`: whether a row on any device has not ended, and none is lost.
    - `step`: the number of decoded tokens.
    - `keys`: one a row; the draw of a step uses the row's key and the step.
    - `states`: the state of each of the sampler's processors.
    - `lost`: rows without a token to choose: 1 if a logit was not finite, -1 if processors forbade every token, else 0.
        Rows that have ended have 0.
    - `log_probs`: of the new tokens and of their alternatives, if requested.
    """

    token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    tokens: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]
    ended: Bool[Array, " batch"]
    unfinished: Bool[Array, ""]
    step: Int[Array, ""]
    keys: Key[Array, " batch"]
    lost: Int[Array, " batch"]
    states: tuple[PyTree, ...] = ()
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
        - `alternatives`: how many likeliest tokens to record for each new one; `None` for no log-probabilities.
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
            lost=none,
            states=states,
            log_probs=None if alternatives is None else LogProbs.init(none.shape[0], new, alternatives),
        )

    def next(self, logits: Array, sampler: Sampler, ends: Int[Array, " ends"], strategy: Strategy) -> "Decoding":
        """Chooses one token a row by its logits, and adds it."""
        processed = sampler.process(logits, self.states, strategy)
        keys = jax.vmap(jr.fold_in, in_axes=(0, None))(self.keys, self.step)
        token, largest = sampler.choose(marked(logits, processed if self.states else None), keys, strategy)
        after = self.append(token, largest, ends, strategy)
        if self.log_probs is not None:
            log_probs = self.log_probs.record(logits, after.token, self.step, strategy)
            after = dataclasses.replace(after, log_probs=log_probs)
        if self.states:
            states = sampler.next_states(self.states, after.token, logits, strategy)
            after = dataclasses.replace(after, states=states)
        return after

    def append(
        self,
        token: Int[Array, " batch"],
        largest: Float[Array, " batch"],
        ends: Int[Array, " ends"],
        strategy: Strategy,
    ) -> "Decoding":
        """Adds one token a row; a row that has ended gets its end token again, and its length stays."""
        token = jnp.where(self.ended, self.token, token)
        now_lost = jnp.where(self.ended, 0, lost(largest))
        ended = self.ended | jnp.any(token[:, None] == ends[None, :], axis=1)
        return Decoding(
            token=token,
            position=self.position + 1,
            tokens=lax.dynamic_update_slice_in_dim(self.tokens, token[:, None], self.step, axis=1),
            lengths=jnp.where(self.ended, self.lengths, self.step + 1),
            ended=ended,
            # If a row is lost, the loop ends at once, and `Request` raises the error.
            unfinished=proceeds(~ended, now_lost, strategy),
            step=self.step + 1,
            keys=self.keys,
            lost=now_lost,
            states=self.states,
            log_probs=self.log_probs,
        )

    def grow(self, new: int) -> "Decoding":
        """The same with room for `new` tokens."""
        tokens = jnp.pad(self.tokens, ((0, 0), (0, new - self.tokens.shape[1])))
        log_probs = None if self.log_probs is None else self.log_probs.grow(new)
        return dataclasses.replace(self, tokens=tokens, log_probs=log_probs)


@eqx.filter_jit
def first_tokens(
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
    """The state after the first new token; `positions` are those of the last prompt tokens. Rows may share logits."""
    strategy, decoding = model.strategy, Decoding.init(positions, ended, keys, new, states, alternatives)

    def append(logits: Array, decoding: Decoding, sampler: Sampler, ends: Array) -> Decoding:
        samples = decoding.token.shape[0] // logits.shape[0]
        return decoding.next(repeated(logits, samples), sampler, ends, strategy)

    state = specs(decoding, strategy)
    in_specs = strategy.spec("batch vocab"), state, specs(sampler, strategy), strategy.spec("")
    return spmd(append, model.mesh, in_specs, state)(logits, decoding, sampler, ends)


@eqx.filter_jit(donate="all-except-first")
def decode(
    kept: tuple[Flat, Decoding, Sampler, Int[Array | np.ndarray, " ends"], Int[Array | np.ndarray, ""]], cache: Cache
) -> tuple[Decoding, Cache]:
    """Decodes in one loop until there are `until` tokens or all rows have ended.

    **Arguments:**

    - `kept`: the model, the state so far, the sampler, the end tokens, and `until`, a number of new tokens.
    - `cache`: donated, and updated in place.

    **Returns:** the state and the cache after the last token.
    """
    flat, decoding, sampler, ends, until = kept
    model: Mistral = flat.tree
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


@eqx.filter_jit
def grow_state(model: Mistral, decoding: Decoding, new: int) -> Decoding:
    """The same state with room for `new` tokens, sharded as before."""
    split = specs(decoding, model.strategy)
    return spmd(lambda decoding: decoding.grow(new), model.mesh, (split,), split)(decoding)
