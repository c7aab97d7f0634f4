"""Products that run beside the exchange of their tokens, where the strategy has the word `overlap`."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import PyTree

from .collectives import all_tokens, psum_tokens, scatter_sum, send_on, shard_index, vary_alike
from .strategy import Strategy


def gathered_product(
    product: Callable[[PyTree, Array], list[Array]],
    weights: PyTree,
    x: Array,
    seq: int,
    strategy: Strategy,
    out_dims: Sequence[str],
    *,
    to: str = "varying",
    whole: bool = False,
) -> list[Array]:
    """`product(weights, all_tokens(x, seq, strategy))`; with `overlap`, each device multiplies the tokens that it has
    while the next ones travel.

    The slices of tokens travel along the ring of devices that split `tokens`. This needs results that are split over
    the same devices: otherwise all tokens are gathered first. Automatic differentiation makes of this ring the one of
    [`mistral_eqx.parallel.scattered_product`][], and the reverse.

    **Arguments:**

    - `product`: from weights and activations `(batch, tokens, ...)` to results `(batch, tokens, ...)`, each token
        alone.
    - `weights`: the weights, of which there may be several.
    - `x`: the tokens of this device, or all of them.
    - `seq`: the number of tokens of each row, over all devices.
    - `strategy`: which dimensions are split over which mesh axes.
    - `out_dims`: the dimensions of each result after `batch` and `tokens`.
    - `to`: as for [`mistral_eqx.parallel.all_tokens`][].
    - `whole`: whether `product` needs all tokens at once.

    **Returns:** the results for all tokens.
    """
    axes = set(strategy.axes("tokens"))
    if whole or not strategy.overlap or x.shape[1] == seq or not all(axes <= {*strategy.axes(d)} for d in out_dims):
        return product(weights, all_tokens(x, seq, strategy, to=to))
    weights, (shard, shards) = _varying_alike(weights, x), shard_index("tokens", strategy)

    def put(found: list[Array], ys: list[Array], at: Array | int) -> list[Array]:
        start = at % shards * x.shape[1]
        return [lax.dynamic_update_slice_in_dim(one, y, start, axis=1) for one, y in zip(found, ys, strict=True)]

    own = product(weights, x)
    empty = [vary_alike(jnp.zeros((len(y), seq, *y.shape[2:]), y.dtype), y)[0] for y in own]
    found, travelling = put(empty, own, shard), {1: x, -1: x}
    for direction, hop in _hops(strategy, shards):
        travelling[direction] = send_on(travelling[direction], direction, strategy, dims="tokens")
        found = put(found, product(weights, travelling[direction]), shard - direction * hop)
    return found


def scattered_product(
    product: Callable[[PyTree, Array], Array],
    weight: PyTree,
    x: Array,
    dims: str,
    strategy: Strategy,
    *,
    whole: bool = False,
) -> Array:
    """`psum_tokens(product(weight, x), dims, strategy)`; with `overlap`, sums travel while each device multiplies the
    next tokens.

    The sum for a slice of tokens begins at the device that is furthest from the one that has these tokens. Each device
    on the way adds its own product, which is computed while the sum travels. Sums travel in the precision of `x`.

    **Arguments:**

    - `product`: from a weight and activations `(batch, tokens, ...)` to partial sums `(batch, tokens, ...)`, each token
        alone.
    - `weight`: the weight.
    - `x`: activations of all tokens.
    - `dims`: the dimensions that `product` sums over.
    - `strategy`: which dimensions are split over which mesh axes.
    - `whole`: whether `product` needs all tokens at once.

    **Returns:** the sums for the tokens of this device, or for all tokens if they cannot be split.
    """
    axes = strategy.axes("tokens")
    shard, shards = shard_index("tokens", strategy) if strategy.axes(dims) else (0, 1)
    if whole or not strategy.overlap or shards == 1 or x.shape[1] % shards:
        return psum_tokens(product(weight, x).astype(x.dtype), dims, strategy)
    size, weight = x.shape[1] // shards, _varying_alike(weight, x)
    sums: dict[int, Array] = {}

    def with_own(at: Array | int, *directions: int) -> Array:
        """The sums that arrive from these directions, and this device's product."""
        y = product(weight, lax.dynamic_slice_in_dim(x, at % shards * size, size, axis=1))
        for direction in directions:
            if direction in sums:
                y = y + send_on(sums[direction], direction, strategy, dims="tokens").astype(y.dtype)
        return y.astype(x.dtype)

    for direction, hop in reversed(_hops(strategy, shards)):
        sums[direction] = with_own(shard + direction * hop, direction)
    y = with_own(shard, 1, -1)
    rest = [axis for axis in strategy.axes(dims) if axis not in axes]
    return scatter_sum(y, rest, axis=-1) if rest else y


def _varying_alike(weights: PyTree, x: Array) -> PyTree:
    """The weights, marked as varying where `x` does, so that their gradient is added up once and not for each slice."""
    return jax.tree.map(lambda leaf: vary_alike(leaf, x)[0] if eqx.is_array(leaf) else leaf, weights)


def _hops(strategy: Strategy, shards: int) -> list[tuple[int, int]]:
    """The direction of each exchange on the ring, and how many hops its slice is then away from its device.

    In both directions the slices of half of the devices come from one side, and those of the others from the other.
    """
    ways = strategy.overlap
    return [(-1 if turn % ways else 1, turn // ways + 1) for turn in range(shards - 1)]
