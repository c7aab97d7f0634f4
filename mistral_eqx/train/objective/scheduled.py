"""Read one's own words at times."""

import dataclasses

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..batch import Batch


def scheduled_sampling(
    batch: Batch,
    predictions: Int[Array, "batch seq"],
    probability: float | Float[Array, ""],
    *,
    key: PRNGKeyArray,
) -> Batch:
    """Some inputs are what the model itself said, so that it learns to go on from its own mistakes
    ([Bengio et al., 2015](https://arxiv.org/abs/1506.03099)).

    The targets stay. Runs in a compiled program, unlike the other objectives, since it needs the model.

    **Arguments:**

    - `batch`: of a causal objective, in which an input is the target of the column before it.
    - `predictions`: what the model says at each column, drawn from its logits or the likeliest token.
    - `probability`: of each input to be replaced. The paper lets it grow in the course of training.
    - `key`: for the coins.

    **Returns:** the batch, in which inputs whose column before counts, in the same text, are replaced.
    """
    said = jnp.roll(predictions, 1, axis=1)
    told = jnp.roll(batch.weights, 1, axis=1) > 0
    column = jnp.arange(batch.inputs.shape[1], dtype=batch.first.dtype)[None, :]
    coins = jr.bernoulli(key, probability, batch.inputs.shape)
    inputs = jnp.where(coins & told & (column > batch.first), said, batch.inputs)
    return dataclasses.replace(batch, inputs=inputs)
