"""Beam search: one compiled `lax.while_loop`, in which no key or value is ever moved."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..checks import CacheDType, Count, checked
from ..errors import InputError
from ..nn import Cache, Mistral
from ..nn.precision import at_least_float32
from ..nn.slots import own_slot, own_slots
from ..parallel import Strategy, gather, gather_to_host, pmax, psum, shard_index, specs, spmd
from .caches import capacity, empty_cache, holds, moved_to_front, packed, parts, slots
from .finite import lost, marked, not_finite, proceeds
from .prompt import Prompts, checked_prompts, pad_left
from .reading import prompt_width, read_chunks
from .request import Request
from .sampler import Sampler


# A cache has room for at least this many steps before it is put in order.
_STEPS = 64


class Rules(eqx.Module):
    """The options of a search as arrays, so that other values do not recompile it.

    **Attributes:**

    - `ends`: the end tokens.
    - `divisors`: what the sum of the log-probabilities of 1, 2, ... tokens is divided by, its length to the power of
        the penalty.
    - `hoped`: what that of the best running beam is divided by, to see if it may still become better than a text that
        has ended.
    - `first_suffice`: whether a row is done as soon as it has as many ended texts as beams.
    - `limit`: the number of new tokens at which every beam ends.
    """

    ends: Int[Array | np.ndarray, " ends"]
    divisors: Float[Array | np.ndarray, " new"]
    hoped: Float[Array | np.ndarray, " new"]
    first_suffice: Bool[Array | np.ndarray, ""]
    limit: Int[Array | np.ndarray, ""]

    @classmethod
    def init(
        cls, ends: np.ndarray, new: int, limit: int, length_penalty: float, early_stopping: bool | Literal["never"]
    ) -> "Rules":
        """Rules with room for `new` tokens, of which `limit` are used.

        **Raises:** `ValueError` if the penalty or the word for early stopping is wrong.
        """
        early_stopping = checked(early_stopping, Literal[True, False, "never"], "early_stopping")
        length_penalty = checked(length_penalty, float, "length_penalty")
        with np.errstate(over="ignore", under="ignore"):
            divisors = np.arange(1.0, new + 1) ** length_penalty
            used = divisors[:limit].astype(np.float32)
        if not (np.isfinite(used) & (used > 0)).all():
            raise InputError(
                f"length_penalty is {length_penalty}, and {limit} to that power is beyond what a float32 can hold; "
                "give a number closer to 0."
            )
        longest = early_stopping == "never" and length_penalty > 0
        hoped = np.full_like(divisors, divisors[limit - 1]) if longest else divisors
        return cls(
            # Duplicates removed.
            np.unique(ends),
            divisors,
            hoped,
            np.asarray(early_stopping is True),
            np.asarray(limit, np.int32),
        )


class Search(eqx.Module):
    """What the loop carries from step to step, besides the cache.

    A beam that has ended moves to the `finished` ones and another takes its place, so that all `beams` continue until
    their row is done. The score of an empty place is minus infinity.

    **Attributes:**

    - `tokens`: the new tokens of each running beam, best beam first; the column of the next one is `step`.
    - `scores`: the sums of their log-probabilities.
    - `token`: the last token of each, which is not in the cache yet.
    - `position`: the position of these tokens in their sequence.
    - `mask`: which slots hold the prompt or a token of each beam. All beams of a row share its slots.
    - `finished_tokens`, `finished_lengths`: the best texts that have ended, best first.
    - `finished_scores`: the sums of their log-probabilities, divided by the rules' divisor.
    - `done`: which rows take no further continuation.
    - `lost`: 1 for a row that was not done and had a logit that is not finite; else 0.
    - `unfinished`: whether a row on any device is not done, and all logits were finite.
    - `step`: the number of decoded tokens.
    """

    tokens: Int[Array, "batch beams new"]
    scores: Float[Array, "batch beams"]
    token: Int[Array, "batch beams"]
    position: Int[Array, " batch"]
    mask: Bool[Array, "batch beams kv_seq"]
    finished_tokens: Int[Array, "batch beams new"]
    finished_lengths: Int[Array, "batch beams"]
    finished_scores: Float[Array, "batch beams"]
    done: Bool[Array, " batch"]
    lost: Int[Array, " batch"]
    unfinished: Bool[Array, ""]
    step: Int[Array, ""]

    @classmethod
    def init(
        cls,
        position: Int[Array, " batch"],
        done: Bool[Array, " batch"],
        beams: int,
        new: int,
        kv_seq: int,
        dtype: DTypeLike = jnp.float32,
    ) -> "Search":
        """The state before the first token. One beam of each row counts, because all would be equal."""
        batch = position.shape[0]
        none = jnp.full((batch, beams), -jnp.inf, dtype)
        return cls(
            tokens=jnp.zeros((batch, beams, new), jnp.int32),
            scores=none.at[:, 0].set(0),
            token=jnp.zeros((batch, beams), jnp.int32),
            position=position,
            mask=jnp.ones((batch, beams, kv_seq), bool),
            finished_tokens=jnp.zeros((batch, beams, new), jnp.int32),
            finished_lengths=jnp.zeros((batch, beams), jnp.int32),
            finished_scores=none,
            done=done,
            lost=jnp.zeros(batch, jnp.int32),
            unfinished=jnp.ones((), bool),
            step=jnp.zeros((), jnp.int32),
        )

    def advance(self, logits: Float[Array, "batch beams vocab"], rules: Rules, strategy: Strategy) -> "Search":
        """Chooses the next token of each beam; the vocabulary of the logits may be sharded."""
        beams, step = self.scores.shape[1], self.step
        # At least `beams` of so many candidates do not end.
        count = max(2, 1 + rules.ends.shape[0]) * beams
        log_probabilities, ids, largest = _likeliest(logits, count, strategy)
        # Empty places do not count.
        counts = ~self.done[:, None] & (self.scores > -jnp.inf)
        now_lost = jnp.max(jnp.where(counts, lost(largest), 0), axis=1)
        sums = (self.scores[:, :, None] + log_probabilities).reshape(ids.shape[0], -1)
        sums, chosen = lax.top_k(sums, min(count, sums.shape[1]))
        parent, token = chosen // ids.shape[2], _take(ids.reshape(ids.shape[0], -1), chosen)
        ends = jnp.any(token[:, :, None] == rules.ends[None, None, :], axis=2) | (step + 1 >= rules.limit)

        # Only a candidate that would have become a beam may end a text.
        divisor, hoped = (lax.dynamic_index_in_dim(x, step).astype(sums.dtype) for x in (rules.divisors, rules.hoped))
        new_scores = sums[:, :beams] / divisor[None]
        new_scores = jnp.where(ends[:, :beams] & ~self.done[:, None], new_scores, -jnp.inf)
        finished_scores, best = lax.top_k(jnp.concatenate([self.finished_scores, new_scores], axis=1), beams)
        new_tokens = _append(_take(self.tokens, parent[:, :beams]), token[:, :beams], step)
        new_lengths = jnp.full_like(self.finished_lengths, step + 1)

        scores, going_on = lax.top_k(jnp.where(ends, -jnp.inf, sums), beams)
        parent, token = _take(parent, going_on), _take(token, going_on)
        may_improve = scores[:, 0] / hoped > finished_scores[:, -1]
        enough = rules.first_suffice & (finished_scores[:, -1] > -jnp.inf)
        done = self.done | ~may_improve | enough
        return Search(
            tokens=_append(_take(self.tokens, parent), token, step),
            scores=scores,
            token=token,
            position=self.position + 1,
            mask=_take(self.mask, parent),
            finished_tokens=_take(jnp.concatenate([self.finished_tokens, new_tokens], axis=1), best),
            finished_lengths=_take(jnp.concatenate([self.finished_lengths, new_lengths], axis=1), best),
            finished_scores=finished_scores,
            done=done,
            lost=now_lost,
            unfinished=proceeds(~done, now_lost, strategy),
            step=step + 1,
        )

    def mask_own(self, slot: Int[Array, ""], strategy: Strategy) -> Bool[Array, "batch beams kv_seq"]:
        """`mask` after the last token of each beam was written to its own slot, from `slot` on."""
        batch, beams = self.token.shape
        own = jnp.broadcast_to(jnp.eye(beams, dtype=bool)[None], (batch, beams, beams))
        own = own_slots(own, slot, strategy, axis=2)
        return lax.dynamic_update_slice_in_dim(self.mask, own, own_slot(slot, strategy), axis=2)


class Beams(NamedTuple):
    """The result of [`mistral_eqx.beam_search`][], the best text of each prompt first.

    **Attributes:**

    - `tokens`: new token ids; a text that ended early repeats its end token.
    - `lengths`: the number of valid tokens of each, the end token included.
    - `scores`: the sum of the log-probabilities of these tokens, divided by `lengths ** length_penalty`.
    """

    tokens: Int[Array, "batch returned new"]
    lengths: Int[Array, "batch returned"]
    scores: Float[Array, "batch returned"]


def _take(x: Array, beams: Array) -> Array:
    """Entries along the second axis, chosen for each row."""
    return jnp.take_along_axis(x, beams.reshape(*beams.shape, *(1,) * (x.ndim - 2)), axis=1, mode="clip")


def _append(tokens: Array, token: Array, step: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(tokens, token[:, :, None], step, axis=2)


def _likeliest(
    logits: Float[Array, "batch beams vocab"], count: int, strategy: Strategy
) -> tuple[Array, Array, Float[Array, "batch beams"]]:
    """The largest log-probabilities of each beam with their tokens, ties to the smallest id; and the largest logit.

    If the vocabulary is split, devices exchange two numbers a beam and their largest logits.
    """
    batch, beams, size = logits.shape
    logits = marked(logits.astype(at_least_float32(logits.dtype)).reshape(batch * beams, size))
    largest = pmax(jnp.max(logits, axis=1, keepdims=True), "vocab", strategy)
    total = psum(jnp.sum(jnp.exp(logits - largest), axis=1, keepdims=True), "vocab", strategy)
    best, ids = lax.top_k(logits, min(count, size))
    part, several = shard_index("vocab", strategy)
    if several > 1:
        best = gather(best, "vocab", strategy, axis=1)
        ids = gather(ids + part * size, "vocab", strategy, axis=1)
        best, at = lax.top_k(best, min(count, best.shape[1]))
        ids = _take(ids, at)
    log_probabilities = (best - largest) - jnp.log(total)
    return log_probabilities.reshape(batch, beams, -1), ids.reshape(batch, beams, -1), largest.reshape(batch, beams)


@eqx.filter_jit
def _first(
    model: Mistral,
    logits: Float[Array, "batch vocab"],
    position: Int[Array | np.ndarray, " batch"],
    done: Bool[Array | np.ndarray, " batch"],
    rules: Rules,
    beams: int,
    kv_seq: int,
) -> Search:
    """The state after the first new token; `position` is that of the last prompt tokens."""
    strategy = model.strategy
    dtype = at_least_float32(logits.dtype)
    search = Search.init(jnp.asarray(position), jnp.asarray(done), beams, rules.divisors.shape[0], kv_seq, dtype)

    def advance(search: Search, logits: Array, rules: Rules) -> Search:
        logits = jnp.broadcast_to(logits[:, None], (logits.shape[0], beams, logits.shape[1]))
        return search.advance(logits, rules, strategy)

    state = specs(search, strategy)
    in_specs = state, strategy.spec("batch vocab"), specs(rules, strategy)
    return spmd(advance, model.mesh, in_specs, state)(search, logits, rules)


@eqx.filter_jit(donate="all-except-first")
def extend(kept: tuple[Mistral, Search, Rules, Int[Array | np.ndarray, ""]], cache: Cache) -> tuple[Search, Cache]:
    """Decodes in one loop until there are `until` tokens or all rows are done.

    **Arguments:**

    - `kept`: the model, the state so far, the rules, and `until`, a number of new tokens.
    - `cache`: donated, and updated in place; it must have free slots for one token a beam and step.

    **Returns:** the state and the cache after the last token.
    """
    model, search, rules, until = kept
    strategy = model.strategy

    def loop(model: Mistral, search: Search, rules: Rules, until: Array, cache: Cache) -> tuple[Search, Cache]:
        def unfinished(carry):
            search, _ = carry
            return (search.step < until) & search.unfinished

        def next_tokens(carry):
            search, cache = carry
            search = eqx.tree_at(lambda search: search.mask, search, search.mask_own(cache.used, strategy))
            positions = jnp.broadcast_to(search.position[:, None], search.token.shape)
            hidden, cache = model.hidden(search.token, positions, cache, search.mask)
            return search.advance(model.logits(hidden), rules, strategy), cache

        return lax.while_loop(unfinished, next_tokens, (search, cache))

    state, layers, whole = specs(search, strategy), specs(cache, strategy), strategy.spec("")
    in_specs = specs(model, strategy), state, specs(rules, strategy), whole, layers
    return spmd(loop, model.mesh, in_specs, (state, layers))(model, search, rules, until, cache)


def _live(model: Mistral, search: Search, cache: Cache) -> Bool[Array, "batch kv_seq"]:
    live = jnp.any(search.mask, axis=1) & (cache.positions >= 0)
    windows = [window for window in model.config.windows if window is not None]
    if len(windows) < model.config.layers:
        return live
    return live & (search.position[:, None] - cache.positions < max(windows))


@eqx.filter_jit
def live_slots(model: Mistral, search: Search, cache: Cache) -> Int[Array, ""]:
    """The number of slots that some beam can still attend to.

    The others hold padding, tokens of dropped beams, and tokens outside every window.
    """
    strategy = model.strategy

    def count(search: Search, cache: Cache) -> Array:
        most = jnp.max(jnp.sum(_live(model, search, cache), axis=1, dtype=jnp.int32))
        return pmax(most, "batch kv_seq", strategy) * shard_index("kv_seq", strategy)[1]

    in_specs = specs(search, strategy), specs(cache, strategy)
    return spmd(count, model.mesh, in_specs, strategy.spec(""))(search, cache)


@eqx.filter_jit
def put_in_order(
    model: Mistral, used: Int[Array, ""], search: Search, cache: Cache, kv_seq: int
) -> tuple[Search, Cache]:
    """Between two loops: copies the slots that beams can attend to to the front of a new cache.

    **Arguments:**

    - `used`: the result of `live_slots`.
    - `kv_seq`: the number of slots of the copy, at least `used`.

    **Returns:** the state and the cache.
    """
    strategy = model.strategy
    share = kv_seq // parts(model, "kv_seq")

    def move(search: Search, cache: Cache, used: Array) -> tuple[Search, Cache]:
        live = _live(model, search, cache)
        moved = moved_to_front(live, share)
        search = eqx.tree_at(lambda search: search.mask, search, moved(search.mask))
        return search, packed(cache, live, moved, used)

    state, split = specs(search, strategy), specs(cache, strategy)
    return spmd(move, model.mesh, (state, split, strategy.spec("")), (state, split))(search, cache, used)


def _check_beams(num_beams: int, num_return_sequences: int, vocab: int) -> tuple[int, int]:
    num_beams = checked(num_beams, Count, "num_beams")
    if num_beams > vocab:
        raise InputError(f"num_beams is {num_beams}, more than the {vocab} tokens of the vocabulary; ask for fewer.")
    num_return_sequences = checked(num_return_sequences, Count, "num_return_sequences")
    if num_return_sequences > num_beams:
        raise InputError(
            f"num_return_sequences is {num_return_sequences}; it must be at least 1 and at most num_beams, {num_beams}."
        )
    return num_beams, num_return_sequences


def beam_search(
    model: Mistral,
    prompts: Prompts,
    *,
    num_beams: int,
    num_return_sequences: int = 1,
    max_new_tokens: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    eos_id: int | Sequence[int] | None = None,
    sampler: None = None,
    cache_dtype: CacheDType | None = None,
) -> Beams:
    """Continues each prompt with the most probable texts that a beam search finds.

    ```python
    best = mx.beam_search(model, prompts, num_beams=4, max_new_tokens=64)
    print(tokenizer.decode(best.tokens[0, 0, : best.lengths[0, 0]], after=prompts[0]))
    ```

    In each step the `num_beams` most probable texts of a prompt so far are continued by every token, and the best
    results are kept. A text that ends is set aside. Texts and scores equal those of transformers.

    **Arguments:**

    - `model`: the model.
    - `prompts`: lists of token ids, of any lengths, or an array of shape `(batch, seq)`, in which -1 on either side is
        padding.
    - `num_beams`: how many texts of each prompt are continued.
    - `num_return_sequences`: how many of them to return.
    - `max_new_tokens`: the most new tokens; by default 256, or as many as the context has room for.
    - `length_penalty`: the log-probability of a finished text is divided by its length to this power. Above 0 it
        favours long texts, below 0 short ones.
    - `early_stopping`: when a prompt with `num_beams` finished texts is done. `True`: at once. `False`: when the best
        unfinished text, if it ended now, would score worse than the worst finished one. `"never"`: when it could not
        score better at any length.
    - `eos_id`: the token, or the tokens, that end a text; by default those of the model's config, `()` for none.
    - `sampler`: refused, because a search draws nothing and has no processors.
    - `cache_dtype`: as in [`mistral_eqx.generate`][].

    **Returns:** [`mistral_eqx.Beams`][], with `tokens` of shape `(batch, num_return_sequences, max_new_tokens)`, and
    `lengths` and `scores` of shape `(batch, num_return_sequences)`.

    **Raises:** `ValueError` if an argument is out of its range, or as [`mistral_eqx.generate`][] does for prompts and
    end tokens; if a logit is not finite.
    """
    checked(model, Mistral, "model", remedy="mistral_eqx.nn.unstack or in_stages makes one")
    if sampler is not None:
        raise InputError("A beam search draws nothing and takes no sampler; leave it out, or use mistral_eqx.generate.")
    num_beams, num_return_sequences = _check_beams(num_beams, num_return_sequences, model.config.vocab)
    rows = checked_prompts(prompts, model.config.vocab)
    request = Request.init(model, rows, max_new_tokens, Sampler(), eos_id, None, cache_dtype=cache_dtype)
    max_new_tokens = request.max_new_tokens
    rules = Rules.init(request.ends, capacity(max_new_tokens), max_new_tokens, length_penalty, early_stopping)
    ids, positions = pad_left(rows, prompt_width(max(map(len, rows))))
    done = np.arange(len(rows) + request.idle) >= len(rows)
    ids, positions = (np.concatenate([x, *[x[:1]] * request.idle]) for x in (ids, positions))
    cache = empty_cache(model, len(ids), slots(model, ids.shape[1]), cache_dtype=cache_dtype)
    logits, cache = read_chunks(model, ids, positions, cache, request.chunk)
    # The last column holds each row's last token.
    search = _first(model, logits, positions[:, -1], done, rules, num_beams, cache.kv_seq)
    while (step := int(search.step)) < max_new_tokens and bool(search.unfinished):
        live = live_slots(model, search, cache)
        room = _room(int(live), num_beams, max_new_tokens - step, holds(model, cache.kv_seq))
        search, cache = put_in_order(model, live, search, cache, slots(model, room))
        until = min(step + (room - int(live)) // num_beams, max_new_tokens)
        search, cache = extend((model, search, rules, np.asarray(until, np.int32)), cache)
    if (rows_lost := gather_to_host(search.lost)).any():
        raise not_finite(f"new token {int(search.step)} of row {int(np.argmax(rows_lost))}")
    tokens, lengths, scores = (
        gather_to_host(x)[: len(rows), :num_return_sequences]
        for x in (search.finished_tokens, search.finished_lengths, search.finished_scores)
    )
    last = np.take_along_axis(tokens, lengths[:, :, None] - 1, axis=2)
    tokens = np.where(np.arange(max_new_tokens) < lengths[:, :, None], tokens[:, :, :max_new_tokens], last)
    return Beams(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(scores))


def _room(live: int, beams: int, steps: int, room: int) -> int:
    """How many slots to have where there are `room`: as many, if they last for a while, or else up to twice as many."""
    least = live + beams * min(steps, _STEPS)
    if least > room:
        least = max(least, min(2 * room, live + beams * steps))
    return max(capacity(least), room)
