"""Speculative decoding: the model checks several proposed tokens in one pass, in one compiled loop."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.tree_util import KeyPath
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..errors import InputError
from ..nn import Cache, Mistral
from ..parallel import Strategy, pmax, pmin, psum, specs, spmd
from ..parallel.spmd import dims_of
from .finite import lost, marked, proceeds
from .flat import Flat
from .loop import Decoding
from .proposals import Draft, Speculate, draft_tokens, look_up
from .sampler import Sampler


# After a trial that did not pay, so many steps without proposals; twice as many after the next, up to a limit.
_PAUSE, _LONGEST_PAUSE = 8, 128
# A pause of a draft, whose cache then lacks tokens, has no end.
_FOREVER = 2**30


class Acceptance(NamedTuple):
    """What came of speculation, over all rows.

    **Attributes:**

    - `accepted`, `proposed`: the numbers of accepted and of proposed tokens.
    - `passes`: passes of the model over proposals.
    - `steps`: passes without proposals.
    """

    accepted: int
    proposed: int
    passes: int
    steps: int

    @property
    def rate(self) -> float:
        """The accepted share of the proposed tokens; 0 if none was proposed."""
        return self.accepted / max(self.proposed, 1)


class Limits(NamedTuple):
    """Where a loop ends, as arrays.

    **Attributes:**

    - `until`: the number of new tokens of each row that has not ended.
    - `new_tokens`: the number of new tokens at which a row ends.
    - `room`, `draft_room`: how many tokens the caches have room for.
    - `passes`: the number of passes of the model.
    - `cost`: of a pass over proposals, in steps without; 0 for proposals in each pass, infinite for none.
    """

    until: Int[Array | np.ndarray, ""]
    new_tokens: Int[Array | np.ndarray, ""]
    room: Int[Array | np.ndarray, ""]
    draft_room: Int[Array | np.ndarray, ""]
    passes: Int[Array | np.ndarray, ""]
    cost: Float[Array | np.ndarray, ""]

    @classmethod
    def init(cls, *, cost: float, **numbers: int) -> "Limits":
        """The limits as arrays, so that others do not recompile the loop."""
        arrays = {name: np.asarray(number, np.int32) for name, number in numbers.items()}
        return cls(**arrays, cost=np.asarray(cost, np.float32))


class Balance(eqx.Module):
    """Whether proposals pay.

    **Attributes:**

    - `gain`: the average number of new tokens of a row in the last passes over proposals.
    - `wait`: how many steps without proposals are left of a pause.
    - `pause`: the length of the next pause.
    - `ready`: whether the next pass is one over proposals.
    - `window`: over about how many passes the average is.
    """

    gain: Float[Array, ""]
    wait: Int[Array, ""]
    pause: Int[Array, ""]
    ready: Bool[Array, ""]
    window: int = eqx.field(static=True)

    @classmethod
    def init(cls, speculate: Speculate) -> "Balance":
        """Begins with hope: as if some proposals of a lookup had been accepted, and all of a draft.

        A lookup pauses soon, since it can go on at any time. A draft cannot, so it gets a longer trial.
        """
        is_draft = isinstance(speculate, Draft)
        gain = 1 + speculate.tokens / (1 if is_draft else 4)
        return cls(
            gain=jnp.asarray(gain, jnp.float32),
            wait=jnp.zeros((), jnp.int32),
            pause=jnp.asarray(_FOREVER if is_draft else _PAUSE, jnp.int32),
            ready=jnp.zeros((), bool),
            window=16 if is_draft else 4,
        )

    def after_pass(self, tokens: Float[Array, ""], cost: Float[Array, ""]) -> "Balance":
        """After a pass that gave an average row so many tokens."""
        gain = self.gain + (tokens - self.gain) / self.window
        loses = gain < cost
        pause = jnp.where((tokens >= cost) & (self.pause <= _LONGEST_PAUSE), _PAUSE, self.pause)
        longer = jnp.where(pause <= _LONGEST_PAUSE, jnp.minimum(2 * pause, _LONGEST_PAUSE), pause)
        # The first pass after a pause decides again.
        gain, wait, pause = (jnp.where(loses, *pair) for pair in ((cost, gain), (pause, 0), (longer, pause)))
        return dataclasses.replace(self, gain=gain, wait=wait, pause=pause)

    def after_step(self) -> "Balance":
        """After a step without proposals."""
        return dataclasses.replace(self, wait=jnp.maximum(self.wait - 1, 0))


class Tally(eqx.Module):
    """The numbers of [`mistral_eqx.Acceptance`][], as arrays."""

    accepted: Int[Array, ""]
    proposed: Int[Array, ""]
    passes: Int[Array, ""]
    steps: Int[Array, ""]

    @classmethod
    def init(cls) -> "Tally":
        """Zeros, each an array of its own, since they are donated."""
        return cls(*(jnp.zeros((), jnp.int32) for _ in range(4)))


class Speculation(eqx.Module):
    """What the loop carries from pass to pass, besides `Decoding`; the caches are updated in place.

    Rows get different numbers of tokens in a pass, so `Decoding.lengths` differ, and `Decoding.step` is the least of
    rows that have not ended.

    **Attributes:**

    - `cache`: the model's.
    - `draft`: that of a draft.
    - `text`: the token at each position of each row's sequence.
    - `balance`: whether proposals pay.
    - `tally`: what came of them.
    """

    cache: Cache
    draft: Cache | None
    text: Int[Array, "batch text"]
    balance: Balance
    tally: Tally

    @property
    def acceptance(self) -> Acceptance:
        """The numbers so far."""
        tally = self.tally
        return Acceptance(int(tally.accepted), int(tally.proposed), int(tally.passes), int(tally.steps))

    def specs(self, strategy: Strategy, draft: Mistral | None) -> PyTree:
        """The `PartitionSpec` of each array; the draft's cache is sharded as the draft is."""
        split = specs(self, strategy)
        if draft is None:
            return split
        return eqx.tree_at(lambda split: split.draft, split, specs(self.draft, draft.strategy))


def verify(
    decoding: Decoding,
    logits: Float[Array, "batch passed vocab"],
    proposals: Int[Array, "batch proposed"],
    sampler: Sampler,
    ends: Int[Array, " ends"],
    limit: Int[Array | np.ndarray, ""],
    strategy: Strategy,
) -> tuple[Decoding, Int[Array, "batch passed"], Int[Array, " batch"]]:
    """Chooses a token at each position as a step would, and keeps those whose context are tokens that were chosen.

    **Arguments:**

    - `logits`: after the last token and after each proposal.
    - `proposals`: one fewer; -1 for none.
    - `limit`: the number of new tokens at which a row ends.

    **Returns:** the state, the chosen tokens, and how many of them each row keeps.
    """
    batch, width, vocab = logits.shape
    processed = _processed(decoding, logits, proposals, sampler, strategy)
    known = marked(logits, processed).reshape(batch * width, vocab)
    at = decoding.lengths[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    keys = jax.vmap(jax.vmap(jr.fold_in, in_axes=(None, 0)))(decoding.keys, at)
    chosen, largest = sampler.choose(known, keys.reshape(-1), strategy)
    chosen, losses = chosen.reshape(batch, width), lost(largest).reshape(batch, width)
    is_end = jnp.any(chosen[..., None] == ends[None, None], axis=-1)
    agreed = _leading(chosen[:, :-1] == proposals)
    count = 1 + jnp.minimum(agreed, _leading(~is_end & (losses == 0)))
    count = jnp.where(decoding.ended, 0, jnp.minimum(count, limit - decoding.lengths))

    def last(x: Array) -> Array:
        return jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]

    lengths = decoding.lengths + count
    ended = decoding.ended | last(is_end) | (lengths >= limit)
    now_lost = jnp.where(count > 0, last(losses), 0)
    after = dataclasses.replace(
        decoding,
        token=jnp.where(count > 0, last(chosen), decoding.token),
        position=decoding.position + count,
        tokens=written(decoding.tokens, chosen, decoding.lengths, count),
        lengths=lengths,
        ended=ended,
        unfinished=proceeds(~ended, now_lost, strategy),
        step=pmin(jnp.min(jnp.where(ended, limit, lengths)), "batch", strategy),
        lost=now_lost,
        states=_states_after(decoding, logits, chosen, count, sampler, strategy),
    )
    return after, chosen, count


def _leading(x: Bool[Array, "batch n"]) -> Int[Array, " batch"]:
    """How many entries of each row come before the first that is false."""
    size = x.shape[1]
    return jnp.min(jnp.where(x, size, jnp.arange(size, dtype=jnp.int32)[None]), axis=1, initial=size)


def written(
    x: Int[Array, "batch columns"],
    tokens: Int[Array, "batch passed"],
    start: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> Int[Array, "batch columns"]:
    """`x` with the first `count` of each row's tokens from column `start` on."""
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    # A column past the end is dropped.
    columns = jnp.where(offsets < count[:, None], start[:, None] + offsets, x.shape[1])
    return x.at[jnp.arange(x.shape[0])[:, None], columns].set(tokens, mode="drop")


def _processed(
    decoding: Decoding, logits: Array, proposals: Array, sampler: Sampler, strategy: Strategy
) -> Array | None:
    """The logits after processors, of which each position's state is that after the proposals before it."""
    if not sampler.processors:
        return None
    states, columns = decoding.states, []
    for at in range(logits.shape[1]):
        if at > 0:
            before = jnp.maximum(proposals[:, at - 1], 0)
            states = sampler.next_states(states, before, logits[:, at - 1], strategy)
        columns.append(sampler.process(logits[:, at], states, strategy))
    return jnp.stack(columns, axis=1)


def _states_after(
    decoding: Decoding, logits: Array, chosen: Array, count: Array, sampler: Sampler, strategy: Strategy
) -> tuple[PyTree, ...]:
    states = decoding.states
    for at in range(logits.shape[1]) if sampler.processors else ():
        following = sampler.next_states(states, chosen[:, at], logits[:, at], strategy)
        states = _where_rows(at < count, following, states)
    return states


def _where_rows(rows: Bool[Array, " batch"], new: PyTree, old: PyTree) -> PyTree:
    """`new` in some rows, else `old`.

    **Raises:** `ValueError` if an array without rows is another one.
    """

    def chosen(path: KeyPath, one: Array, other: Array) -> Array:
        dims = dims_of(old, path).split()
        if "batch" not in dims:
            if one is not other:
                name = jax.tree_util.keystr(path)
                raise InputError(
                    f"A processor changes {name} of its state, which has no dimension 'batch'; with speculate, rows "
                    "get tokens at different times, so give it one entry a row."
                )
            return one
        axis = dims.index("batch")
        return jnp.where(rows.reshape([-1 if at == axis else 1 for at in range(one.ndim)]), one, other)

    return jax.tree_util.tree_map_with_path(chosen, new, old)


@eqx.filter_jit(donate="all-except-first")
def speculate(
    kept: tuple[Flat, Flat | None, Decoding, Sampler, Int[Array | np.ndarray, " ends"], Limits, int, int],
    speculation: Speculation,
) -> tuple[Decoding, Speculation]:
    """Decodes in one loop until a limit is reached or all rows have ended.

    The loop contains two others: steps without proposals as long as there are none or they do not pay, and passes over
    proposals as long as they do. A conditional in their place would copy the cache.

    **Arguments:**

    - `kept`: the model, the draft, the state so far, the sampler, the end tokens, the limits, and how many tokens to
        propose, by which n-gram.
    - `speculation`: donated, and updated in place.

    **Returns:** the state and the caches after the last token.
    """
    flat, drafter, decoding, sampler, ends, limits, tokens, ngram = kept
    model: Mistral = flat.tree
    draft: Mistral | None = None if drafter is None else drafter.tree
    strategy = model.strategy

    def loop(
        model: Mistral,
        draft: Mistral | None,
        decoding: Decoding,
        sampler: Sampler,
        ends: Array,
        limits: Limits,
        speculation: Speculation,
    ) -> tuple[Decoding, Speculation]:
        stops_at = speculation.tally.passes + speculation.tally.steps + limits.passes

        def goes_on(carry):
            decoding, now = carry
            fits = now.cache.used + tokens < limits.room
            if now.draft is not None:
                fits &= now.draft.used + tokens < limits.draft_room
            going = decoding.unfinished & (decoding.step < limits.until) & fits
            return going & (now.tally.passes + now.tally.steps < stops_at)

        def decided(decoding, now):
            found = jnp.ones((), bool)
            if draft is None:
                found = look_up(now.text, decoding.position, 1, ngram)[:, 0] >= 0
                found = pmax(jnp.max((found & ~decoding.ended).astype(jnp.int32)), "batch", strategy) == 1
            pays = (now.balance.wait == 0) & jnp.isfinite(limits.cost)
            ready = (limits.cost <= 0) | (found & pays)
            return dataclasses.replace(now, balance=dataclasses.replace(now.balance, ready=ready))

        def passed(carry, proposals, draft_cache):
            """One pass over the last token and proposals, of which there may be none."""
            decoding, now = carry
            active = ~decoding.ended
            proposals = jnp.where(active[:, None], proposals, -1)
            given = jnp.concatenate([jnp.where(active, decoding.token, -1)[:, None], proposals], axis=1)
            offsets = jnp.arange(given.shape[1], dtype=jnp.int32)[None]
            positions = jnp.where(given < 0, -1, decoding.position[:, None] + offsets)
            hidden, cache = model.hidden(jnp.maximum(given, 0), positions, now.cache)
            logits = model.logits(hidden)
            after, chosen, count = verify(decoding, logits, proposals, sampler, ends, limits.new_tokens, strategy)
            longest = pmax(jnp.max(count), "batch", strategy)
            is_proposed = proposals >= 0
            is_accepted = is_proposed & (chosen[:, :-1] == proposals) & (offsets[:, :-1] < count[:, None])
            sums = [jnp.sum(x, dtype=jnp.int32) for x in (count, active, is_accepted, is_proposed)]
            new, rows, accepted, proposed = psum(jnp.stack(sums), "batch", strategy)

            def settled(cache, before):
                # Rejected tokens become padding. The next pass overwrites those that no row has accepted.
                return Cache(cache.layers, cache.keep(after.position).positions, before.used + longest)

            over = proposals.shape[1] > 0
            mean = new.astype(jnp.float32) / jnp.maximum(rows, 1).astype(jnp.float32)
            # A pass that was asked for although nothing is proposed tells nothing.
            mean = jnp.where(proposed > 0, mean, now.balance.gain)
            now = dataclasses.replace(
                now,
                cache=settled(cache, now.cache),
                draft=now.draft if draft_cache is None else settled(draft_cache, now.draft),
                text=written(now.text, chosen, decoding.position + 1, count),
                balance=now.balance.after_pass(mean, limits.cost) if over else now.balance.after_step(),
                tally=Tally(
                    now.tally.accepted + accepted,
                    now.tally.proposed + proposed,
                    now.tally.passes + int(over),
                    now.tally.steps + int(not over),
                ),
            )
            return after, decided(after, now)

        def step(carry):
            return passed(carry, jnp.zeros((carry[0].token.shape[0], 0), jnp.int32), None)

        def over_proposals(carry):
            decoding, now = carry
            if draft is None:
                return passed(carry, look_up(now.text, decoding.position, tokens, ngram), None)
            return passed(carry, *draft_tokens(draft, now.draft, decoding, now.text, sampler, tokens))

        def both(carry):
            carry = lax.while_loop(lambda carry: goes_on(carry) & ~carry[1].balance.ready, step, carry)
            return lax.while_loop(lambda carry: goes_on(carry) & carry[1].balance.ready, over_proposals, carry)

        return lax.while_loop(goes_on, both, (decoding, decided(decoding, speculation)))

    state, whole = specs(decoding, strategy), strategy.spec("")
    split = speculation.specs(strategy, draft)
    drafted = None if draft is None else specs(draft, draft.strategy)
    in_specs = specs(model, strategy), drafted, state, specs(sampler, strategy), whole, whole, split
    arguments = model, draft, decoding, sampler, ends, limits, speculation
    return spmd(loop, model.mesh, in_specs, (state, split))(*arguments)


@eqx.filter_jit
def grow_text(model: Mistral, text: Int[Array, "batch text"], width: int) -> Int[Array, "batch _"]:
    """The same with room for a sequence of `width` tokens, sharded as before."""
    rows = model.strategy.spec("batch")
    return spmd(lambda text: jnp.pad(text, ((0, 0), (0, width - text.shape[1]))), model.mesh, (rows,), rows)(text)
