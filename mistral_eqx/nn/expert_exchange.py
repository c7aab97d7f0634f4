"""How tokens meet the experts that other devices hold: each device gathers all tokens, or the tokens travel."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..parallel import (
    Strategy,
    all_to_all,
    gather_shards,
    holders,
    largest_anywhere,
    psum_tokens,
    scatter_sum,
    vary_over,
)
from .precision import at_least_float32


# With fewer tokens on a device, their choices are too uneven for a buffer, and the number of exchanges costs more than
# their bytes.
_FEWEST_TOKENS = 128
# A buffer has room for this many times the tokens that an even router sends to each device.
_SLACK = 1.5

# From activations to the experts of each token and their shares of the result.
Route = Callable[
    [Float[Array, "batch seq embed"]],
    tuple[Int[Array, "batch seq per_token"], Float[Array, "batch seq per_token"]],
]
# The partial sums of the experts that this device holds, for any tokens.
Compute = Callable[
    [Float[Array, "batch seq embed"], Int[Array, "batch seq per_token"], Float[Array, "batch seq per_token"]],
    Float[Array, "batch seq embed"],
]


def exchange_slots(tokens: int, per_token: int, experts: int, count: int, most: int | None = None) -> int:
    """The tokens that a device can send to each other one by `all_to_all`; `tokens` if it is better to gather all.

    This is the one place that chooses between the two. The exchange by `all_to_all` sends so many tokens to each
    device and back, the other one sends all of them. If more tokens than this choose one device, all are gathered too.

    **Arguments:**

    - `tokens`: the tokens of one device.
    - `per_token`: the experts of each token.
    - `experts`, `count`: the experts of the layer, and those of one device.
    - `most`: the most tokens that one device can need, if the experts have a capacity.
    """
    if tokens < _FEWEST_TOKENS:
        return tokens
    # An even router chooses none of `count` experts with the complement of this probability.
    share = 1 - math.comb(experts - count, per_token) / math.comb(experts, per_token)
    slots = min(tokens, math.ceil(_SLACK * share * tokens))
    return slots if most is None else min(slots, most)


def travel_axes(strategy: Strategy, *, tokens_split: bool) -> tuple[str, ...]:
    """The mesh axes that split experts, and along which devices have different tokens."""
    tokens = strategy.axes("batch tokens" if tokens_split else "batch")
    return tuple(axis for axis in strategy.axes("experts") if axis in tokens)


def exchanged(
    compute: Compute,
    route: Route,
    x: Float[Array, "batch own embed"],
    seq: int,
    strategy: Strategy,
    count: int,
    chosen: tuple[Array, Array] | None = None,
    limit: int | None = None,
) -> Float[Array, "batch tokens embed"]:
    """The sum over all experts of all devices, for the tokens of this device. No token is dropped.

    **Arguments:**

    - `compute`: the partial sums of this device's experts.
    - `route`: the router.
    - `x`: the tokens of this device, or all of them, shape `(batch, own, embed)`.
    - `seq`: the number of tokens of each row over all devices that split `tokens`.
    - `strategy`: which dimensions are split over which mesh axes.
    - `count`: the experts of this device.
    - `chosen`: the experts of each token of this device, -1 for none, and their shares; those of the router unless
        given. They travel with their tokens.
    - `limit`: the most tokens of a row that choose one expert, if `chosen` is given.
    """
    axes = travel_axes(strategy, tokens_split=x.shape[1] != seq)
    rest = tuple(axis for axis in strategy.axes("tokens") if axis not in axes)
    if x.shape[1] != seq and rest:
        x, chosen = jax.tree.map(lambda leaf: gather_shards(leaf, rest, axis=1, to="varying"), (x, chosen))
    if axes:
        y = _from_other_devices(compute, route, x, chosen, axes, strategy, count, limit)
    else:
        y = compute(x, *(route(x) if chosen is None else chosen))
    return psum_tokens(y, "experts hidden", strategy, done=axes)


def gathered(
    compute: Compute,
    route: Route,
    x: Float[Array, "batch own embed"],
    axes: Sequence[str],
    chosen: tuple[Array, Array] | None = None,
) -> Float[Array, "batch own embed"]:
    """The sums for the tokens of this device: each device along mesh axes gathers all tokens and computes them."""
    every, chosen = jax.tree.map(lambda leaf: gather_shards(leaf, axes, axis=0, to="varying"), (x, chosen))
    return scatter_sum(compute(every, *(route(every) if chosen is None else chosen)), axes, axis=0)


def _from_other_devices(
    compute: Compute,
    route: Route,
    x: Array,
    chosen: tuple[Array, Array] | None,
    axes: tuple[str, ...],
    strategy: Strategy,
    count: int,
    limit: int | None,
) -> Array:
    experts, shares = route(x) if chosen is None else chosen
    tokens, per_token = x.shape[0] * x.shape[1], experts.shape[-1]
    holder, devices = holders("experts", axes, strategy)
    most = None if limit is None else x.shape[0] * count * limit
    slots = exchange_slots(tokens, per_token, count * len(holder), count, most)

    def by_gathering(x: Array, experts: Array, shares: Array) -> Array:
        return gathered(compute, route, x, axes, None if chosen is None else (experts, shares))

    if slots == tokens:
        return by_gathering(x, experts, shares)

    def needed(experts: Array) -> Array:
        """The device that each choice needs; the number of devices for none."""
        experts = experts.reshape(-1, per_token)
        return jnp.where(experts < 0, devices, holder[experts // count])

    def by_all_to_all(x: Array, experts: Array, shares: Array) -> Array:
        # Here their gradients are smaller than those of the buffers.
        x, shares = vary_over("experts hidden", strategy, x, shares)
        flat, experts, shares = (leaf.reshape(-1, leaf.shape[-1]) for leaf in (x, experts, shares))
        source, is_used, back = _packing(needed(experts), devices, slots)
        numbers = jnp.where(is_used[..., None], experts[source], -1).astype(shares.dtype)
        notes = all_to_all(jnp.concatenate([shares[source], numbers], axis=-1), axes)
        y = compute(
            all_to_all(flat[source], axes), notes[..., per_token:].astype(experts.dtype), notes[..., :per_token]
        )
        return _summed(all_to_all(y, axes), back).astype(x.dtype).reshape(x.shape)

    if slots == most:
        return by_all_to_all(x, experts, shares)
    sent = jnp.sum(_is_sent(needed(experts), devices), axis=0, dtype=jnp.int32)
    return lax.cond(largest_anywhere(jnp.max(sent)) <= slots, by_all_to_all, by_gathering, x, experts, shares)


def _is_sent(to: Int[Array, "tokens per_token"], devices: int) -> Bool[Array, "tokens devices"]:
    """Which tokens go to which devices: one copy, however many of a token's experts a device holds."""
    return jnp.any(to[:, :, None] == jnp.arange(devices, dtype=to.dtype)[None, None], axis=1)


def _packing(to: Int[Array, "tokens per_token"], devices: int, slots: int):
    """The token in each slot of the buffers for each device, which slots are used, and where results come back."""
    is_sent, tokens = _is_sent(to, devices), len(to)
    slot = jnp.cumsum(is_sent, axis=0, dtype=to.dtype) - 1
    rows = jnp.broadcast_to(jnp.arange(tokens, dtype=to.dtype)[:, None], is_sent.shape)
    columns = jnp.broadcast_to(jnp.arange(devices, dtype=to.dtype)[None], is_sent.shape)
    # Slots past the last are dropped: those of tokens that stay away.
    unused = jnp.full((devices, slots), tokens, to.dtype)
    source = unused.at[columns, jnp.where(is_sent, slot, slots)].set(rows, mode="drop")
    is_again = jnp.tril(to[:, :, None] == to[:, None, :], -1).any(axis=2)
    device = jnp.minimum(to, devices - 1)
    back = device, jnp.take_along_axis(slot, device, axis=1), (to < devices) & ~is_again
    return jnp.minimum(source, tokens - 1), source < tokens, back


def _summed(y: Float[Array, "devices slots embed"], back: tuple[Array, Array, Array]) -> Float[Array, "tokens embed"]:
    device, slot, counts = back
    y = y.astype(at_least_float32(y.dtype))
    return jnp.sum(jnp.where(counts[..., None], y[device, slot], 0), axis=1)
