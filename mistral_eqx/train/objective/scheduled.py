"""Scheduled sampling: some inputs are the model's own predictions."""

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
    """Replaces some inputs by the model's own predictions, so that the model learns to continue from its mistakes
    ([Bengio et al., 2015](https://arxiv.org/abs/1506.03099)).

    The targets do not change. Unlike the other objectives it runs in a compiled program, because it needs the model.

    **Arguments:**

    - `batch`: a batch of a causal objective, in which each input is the target of the column before it.
    - `predictions`: the model's token at each column, sampled from its logits or the most likely one.
    - `probability`: the probability that an input is replaced. In the paper it grows during training.
    - `key`: the random key.

    **Returns:** the batch with replaced inputs. An input can be replaced if the column before it is in the same
    sequence and its target has weight.
    """
    previous = jnp.roll(predictions, 1, axis=1)
    was_target = jnp.roll(batch.weights, 1, axis=1) > 0
    column = jnp.arange(batch.inputs.shape[1], dtype=batch.first.dtype)[None, :]
    drawn = jr.bernoulli(key, probability, batch.inputs.shape)
    inputs = jnp.where(drawn & was_target & (column > batch.first), previous, batch.inputs)
    return dataclasses.replace(batch, inputs=inputs)
