"""What routers do with a batch, from which training computes its losses of routers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class RouterSums(NamedTuple):
    """Sums over tokens and over layers, in the precision of the router's scores.

    **Attributes:**

    - `tokens`: the number of tokens.
    - `chosen`: the number of tokens that chose each expert; no gradient passes.
    - `probabilities`: the probabilities of each expert.
    - `squares`: the squares of `log Σ exp(score)`.
    - `dropped`: the fraction of its choices that a token lost by a capacity; `None` without one.
    """

    tokens: Float[Array, "..."]
    chosen: Float[Array, "... routes"]
    probabilities: Float[Array, "... routes"]
    squares: Float[Array, "..."]
    dropped: Float[Array, "..."] | None


def packed(sums: RouterSums) -> Float[Array, "... numbers"]:
    """The sums as one array of `2 routes + 2` numbers, so that devices exchange them at once; see `unpacked`.

    With a capacity there is one number more.
    """
    alone = [sums.tokens, sums.squares, *([] if sums.dropped is None else [sums.dropped])]
    return jnp.concatenate([*(one[..., None] for one in alone), sums.chosen, sums.probabilities], axis=-1)


def unpacked(numbers: Float[Array, "... numbers"]) -> RouterSums:
    """The inverse of `packed`."""
    with_capacity = numbers.shape[-1] % 2
    chosen, probabilities = jnp.split(numbers[..., 2 + with_capacity :], 2, axis=-1)
    dropped = numbers[..., 2] if with_capacity else None
    return RouterSums(numbers[..., 0], chosen, probabilities, numbers[..., 1], dropped)


def router_sums(
    scores: Float[Array, "batch tokens routes"],
    experts: Int[Array, "batch tokens per_token"],
    counted: Bool[Array, "batch tokens"],
    kept: Bool[Array, "batch tokens per_token"] | None = None,
) -> RouterSums:
    """The sums of one layer.

    **Arguments:**

    - `scores`, `experts`: the router's scores, and the experts that it chose.
    - `counted`: which tokens count.
    - `kept`: which choices a capacity keeps.
    """
    routes, weights = jnp.arange(scores.shape[-1], dtype=experts.dtype), counted.astype(scores.dtype)
    dropped = None if kept is None else jnp.sum(weights * jnp.mean((~kept).astype(scores.dtype), axis=2))
    is_chosen = jnp.any(experts[..., None] == routes[None, None, None], axis=2)
    return RouterSums(
        tokens=jnp.sum(weights),
        chosen=jnp.sum(weights[..., None] * is_chosen.astype(scores.dtype), axis=(0, 1)),
        probabilities=jnp.sum(weights[..., None] * jax.nn.softmax(scores), axis=(0, 1)),
        squares=jnp.sum(weights * jax.nn.logsumexp(scores, axis=-1) ** 2),
        dropped=dropped,
    )
