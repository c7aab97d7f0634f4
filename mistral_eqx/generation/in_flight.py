"""Decoding in stages, with as many groups of rows as stages: each stage computes another group at the same time."""

from typing import NamedTuple, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

from ..nn import Cache, Context, Mistral
from ..nn.pipeline import zeros_like
from ..parallel import Strategy, from_last_stage, next_stage, shard_index, specs, spmd
from .finite import proceeds
from .flat import Flat
from .loop import Decoding
from .sampler import Sampler


Rows = TypeVar("Rows")


class _Flight(NamedTuple):
    """What the loop carries from round to round.

    In a round, each group enters the first stage once, with the token that was chosen for it just before. It leaves the
    last stage `stages - 1` ticks later, so that all but the first group leave in the next round. The last round lets
    them out, and nothing enters.

    **Attributes:**

    - `groups`: the state of each group of rows.
    - `inside`: the token of each group that is in the stages, its position, and the cache's positions.
    - `layers`: the caches of this stage's layers, with all rows.
    - `used`: the slot of the tokens that enter in this round.
    - `sent`, `received`: what this stage computed and received in the last tick.
    - `rounds`: the number of complete rounds.
    - `drains`: whether this is the last round; `done`: whether it is over.
    """

    groups: tuple[Decoding, ...]
    inside: tuple[tuple[Array, Array, Array], ...]
    layers: PyTree
    used: Array
    sent: Array
    received: Array
    rounds: Array
    drains: Array
    done: Array


@eqx.filter_jit(donate="all-except-first")
def decode_in_groups(
    kept: tuple[Flat, Decoding, Sampler, Int[Array | np.ndarray, " ends"], Int[Array | np.ndarray, ""]], cache: Cache
) -> tuple[Decoding, Cache]:
    """Does what [`mistral_eqx.generation.loop.decode`][] does, for a model in stages.

    The number of rows on a device must be a multiple of the number of stages. At least one token is decoded.
    """
    flat, decoding, sampler, ends, until = kept
    model: Mistral = flat.tree
    strategy = model.strategy

    def run(
        model: Mistral, decoding: Decoding, sampler: Sampler, ends: Array, until: Array, cache: Cache
    ) -> tuple[Decoding, Cache]:
        number, stages = shard_index("layers", strategy)
        size, first = decoding.token.shape[0] // stages, decoding.step

        def context(at: Array, known: Array, slot: Array, group: Array | int = 0) -> Context:
            rope, cached, row = model.config.rope, (known, slot), jnp.asarray(group * size, jnp.int32)
            return Context.init(rope, at[:, None], dtype=model.dtype, strategy=strategy, cached=cached, row=row)

        def tick(now: _Flight, at: int) -> _Flight:
            groups, inside = [*now.groups], [*now.inside]
            token, position, known = groups[at].token, groups[at].position, inside[at][2]
            entered = token, position, context(position, known, now.used).key_index
            inside[at] = _chosen(now.drains, inside[at], entered)
            # A stage without a group computes the last one again, from what it had received: that changes nothing.
            own = jnp.where(now.drains, jnp.minimum(at - number + stages, stages - 1), (at - number) % stages)
            received = jnp.where(now.drains & (number <= at), now.received, next_stage(now.sent, strategy))
            is_of_last_round = now.drains | ((own > at) & (now.rounds > 0))
            slot = now.used - is_of_last_round.astype(jnp.int32)
            token, position, known = jax.tree.map(
                lambda *each: lax.dynamic_index_in_dim(jnp.stack(each), own, keepdims=False), *inside
            )
            sent, layers = model.stage(received, token[:, None], context(position, known, slot, own), now.layers)
            leaving = (at + 1) % stages
            before = groups[leaving]
            logits = model.logits(model.norm(from_last_stage(sent, strategy)))[:, 0]
            after = before.next(logits, sampler, ends, strategy)
            leaves = ~now.drains if leaving == 0 else now.rounds > 0
            groups[leaving] = _chosen(leaves & before.unfinished, after, before)
            return now._replace(groups=tuple(groups), inside=tuple(inside), layers=layers, sent=sent, received=received)

        def next_round(now: _Flight) -> _Flight:
            drains = now.drains
            for at in range(stages):
                now = tick(now, at)
            entered = 1 - drains.astype(jnp.int32)
            rounds = now.rounds + entered
            going = _unfinished(now.groups, strategy) & (first + rounds < until)
            return now._replace(used=now.used + entered, rounds=rounds, drains=~going, done=drains)

        groups = _split(decoding, stages)
        known = jnp.split(cache.positions, stages)
        inside = tuple((one.token, one.position, each) for one, each in zip(groups, known, strict=True))
        own = context(groups[0].position, known[0], cache.used, number)
        nothing = zeros_like(
            jax.eval_shape(lambda layers: model.stage(None, groups[0].token[:, None], own, layers)[0], cache.layers)
        )
        no = jnp.zeros((), bool)
        start = _Flight(groups, inside, cache.layers, cache.used, nothing, nothing, jnp.zeros_like(first), no, no)
        now = lax.while_loop(lambda now: ~now.done, next_round, start)
        decoding = _joined(now.groups)
        decoding = eqx.tree_at(
            lambda decoding: (decoding.step, decoding.unfinished),
            decoding,
            (first + now.rounds, _unfinished(now.groups, strategy)),
        )
        return decoding, Cache(now.layers, jnp.concatenate([known for _, _, known in now.inside]), now.used)

    state, layers, whole = specs(decoding, strategy), specs(cache, strategy), strategy.spec("")
    in_specs = specs(model, strategy), state, specs(sampler, strategy), whole, whole, layers
    return spmd(run, model.mesh, in_specs, (state, layers))(model, decoding, sampler, ends, until, cache)


def _unfinished(groups: tuple[Decoding, ...], strategy: Strategy) -> Array:
    ended, lost = (jnp.concatenate(each) for each in zip(*((one.ended, one.lost) for one in groups), strict=True))
    return proceeds(~ended, lost, strategy)


def _chosen(flag: Array, after: Rows, before: Rows) -> Rows:
    # What does not change may have a type from which nothing can be chosen, such as keys.
    return jax.tree.map(lambda new, old: old if new is old else jnp.where(flag, new, old), after, before)


def _axes(tree: PyTree) -> PyTree:
    """The axis of the rows of each array; -1 for an array without rows."""
    split = specs(tree, Strategy("batch@rows"))
    return jax.tree.map(lambda spec: next((axis for axis, name in enumerate(spec) if name == "rows"), -1), split)


def _split(tree: Rows, count: int) -> tuple[Rows, ...]:
    """Equal groups of rows."""

    def group(number: int) -> Rows:
        def own(x: Array, axis: int) -> Array:
            if axis < 0:
                return x
            size = x.shape[axis] // count
            return x[(slice(None),) * axis + (slice(number * size, (number + 1) * size),)]

        return jax.tree.map(own, tree, _axes(tree))

    return tuple(map(group, range(count)))


def _joined(groups: tuple[Rows, ...]) -> Rows:
    """The inverse of `_split`; what has no rows is that of the first group."""
    return cast(
        Rows,
        jax.tree.map(
            lambda axis, *parts: parts[0] if axis < 0 else jnp.concatenate(parts, axis), _axes(groups[0]), *groups
        ),
    )
