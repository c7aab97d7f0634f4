"""Attention to keys and values that several devices have, where the strategy splits `kv_seq` or `seq`."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..parallel import Strategy, all_slices, own_slices, pmax, psum_together, send_on, shard_index
from .context import Context


# From keys, and the mask index of each, to the weighted sums of values and the logarithms of the sums of exponentiated
# scores.
Attend = Callable[[tuple[Array, ...], Array], tuple[Array, Array]]


def over_devices(
    attend: Attend,
    keys: tuple[Float[Array, "batch kv_heads own _"], ...],
    key_index: Int[Array, "batch kv_seq"],
    context: Context,
    window: int | None,
    strategy: Strategy,
) -> Float[Array, "batch seq *heads value_dim"]:
    """The softmax-weighted sums of the values of all devices.

    - If the strategy splits `kv_seq` and not `seq`, devices have different keys of the same queries. Each attends to
        its own keys, and the results are merged in two exchanges.
    - If it splits `seq` and `kv_seq`, each device has queries and keys of its own tokens. The keys travel from device
        to device along a ring, and each device merges the results that it computes on the way
        ([Ring Attention](https://arxiv.org/abs/2310.01889)).
    - If it splits `seq` and not `kv_seq`, each device gathers all keys first.

    **Arguments:**

    - `attend`: attends to some keys.
    - `keys`: arrays with one entry for each key of this device along their third axis, such as keys and values.
    - `key_index`: the mask index of each key of this device; where `seq` is split, of each key of all devices.
    - `context`: what all layers share in this forward pass.
    - `window`, `strategy`: as for [`mistral_eqx.nn.Attention`][].
    """
    if not context.splits_seq:
        return _merged_over_shards(*attend(keys, key_index), strategy)
    if not strategy.axes("kv_seq"):
        mixed, _ = attend(tuple(all_slices(x, strategy, axis=2) for x in keys), key_index)
        return mixed
    # The mask is known to follow the columns only where it is a span.
    window = None if context.span is None else window
    first, *others = ring_hops(window, key_index.shape[1], shard_index("seq", strategy)[1])
    is_cached = key_index.shape[1] == keys[0].shape[2]
    found = attend(keys, key_index if is_cached else own_slices(key_index, strategy, axis=1))
    for before, hop in zip((first, *others), others, strict=False):
        keys = tuple(send_on(x, hop - before, strategy) for x in keys)
        if is_cached:
            # The slots of a cache travel with their indices.
            key_index = send_on(key_index, hop - before, strategy)
        index = key_index if is_cached else own_slices(key_index, strategy, axis=1, hop=hop)
        found = _merged(found, attend(keys, index))
    return found[0]


def ring_hops(window: int | None, seq: int, devices: int) -> list[int]:
    """After how many hops along the ring keys meet a query that can attend to them, on any device.

    A query and a key whose slices are `d` apart are at least `(d - 1) size + 1` columns apart. At hop `h`, the slices
    of a device are at least `min(h, devices - h)` apart from those that visit it.

    **Arguments:**

    - `window`: how many columns a query attends to on either side, itself included; `None` for all.
    - `seq`: the number of tokens of a row, over all devices.
    - `devices`: the number of devices that split `seq`.
    """
    size = seq // (2 * devices)
    furthest = devices if window is None else (window - 2) // size + 1
    return [hop for hop in range(devices) if min(hop, devices - hop) <= furthest]


def _merged_over_shards(
    mixed: Float[Array, "batch seq *heads value_dim"], log_sum: Float[Array, "batch seq *heads 1"], strategy: Strategy
) -> Float[Array, "batch seq *heads value_dim"]:
    if not strategy.axes("kv_seq"):
        return mixed
    weight = jnp.exp(log_sum - pmax(log_sum, "kv_seq", strategy))
    mixed, total = psum_together(mixed * weight, weight, "kv_seq", strategy)
    return mixed / total


def _merged(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """The weighted sums over the keys of both, and the logarithms of the sums of exponentiated scores."""
    largest = lax.stop_gradient(jnp.maximum(one[1], other[1]))
    weights = [jnp.exp(log_sum - largest) for _, log_sum in (one, other)]
    total = weights[0] + weights[1]
    mixed = (one[0] * weights[0] + other[0] * weights[1]) / total
    return mixed, largest + jnp.log(total)
