"""A capacity of experts: how many tokens of a row an expert computes in training."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def capacity_limit(factor: float, tokens: int, per_token: int, experts: int) -> int:
    """The most tokens of a row that an expert computes: `ceil(factor * per_token * tokens / experts)`, at most all.

    It is the expert capacity of [Switch Transformer, section 2.2](https://arxiv.org/abs/2101.03961), for several
    experts per token. The rows of a batch are the groups of [GShard, section 2.2](https://arxiv.org/abs/2006.16668).
    """
    return math.ceil(min(tokens, factor * per_token * tokens / experts))


def within_capacity(
    chosen: Int[Array, "batch seq per_token"], factor: float, experts: int
) -> Bool[Array, "batch seq per_token"]:
    """Which choices are kept: those of the first tokens of a row that chose an expert, up to its limit.

    Each row is counted alone, and its padding neither counts nor is kept. So the result depends neither on other rows
    nor on the length of the padding.

    **Arguments:**

    - `chosen`: the experts of all tokens of the rows, without repetitions; -1 for padding.
    - `factor`: the capacity factor.
    - `experts`: the number of experts.
    """
    seq, per_token = chosen.shape[1:]
    # A table, so that the products are rounded as on the host.
    limits = np.asarray([capacity_limit(factor, tokens, per_token, experts) for tokens in range(seq + 1)], np.int32)
    routes = jnp.arange(experts, dtype=chosen.dtype)
    is_chosen = jnp.any(chosen[..., None] == routes[None, None, None], axis=2)
    # Choices of each expert up to this token: 1 for the first one.
    number = jnp.take_along_axis(jnp.cumsum(is_chosen, axis=1, dtype=jnp.int32), jnp.maximum(chosen, 0), axis=2)
    limit = jnp.asarray(limits)[jnp.sum(chosen[..., 0] >= 0, axis=1)]
    return (chosen >= 0) & (number <= limit[:, None, None])
