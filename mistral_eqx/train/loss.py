"""How badly a model tells the targets of a batch."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..nn import Unembedding, log_likelihood
from .batch import Batch


class Sums(NamedTuple):
    """Sums over tokens, not means: those of parts of a batch are added up, and divided once by the weight of all.

    **Attributes:**

    - `loss`: what is made small.
    - `cross_entropy`: the part of it that is minus the logarithm of the targets' probabilities.
    - `correct`: of the targets that are the likeliest token, of equally likely ones the first.
    - `weight`: of the tokens that count.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]


def loss_sums(
    head: Unembedding,
    hidden: Float[Array, "batch seq embed"],
    batch: Batch,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Sums:
    """Weighted sums of the loss over tokens.

    With `p` the probabilities, `V` entries of the vocabulary and `Z` the sum of exponentiated logits, a token's loss is
    `-(1 - label_smoothing) log p[target] - label_smoothing / V Σ log p + z_loss (log Z)²`
    ([label smoothing, section 7](https://arxiv.org/abs/1512.00567), [z-loss, section 5](https://arxiv.org/abs/2204.02311)).

    **Arguments:**

    - `head`, `hidden`: the output head, and what it is applied to.
    - `batch`: its targets, and how much each counts.
    - `label_smoothing`: how much of a target's probability is to be shared by all tokens.
    - `z_loss`: the weight of the square that keeps logits from drifting away; PaLM takes 1e-4.

    **Returns:** the sums, over this device's rows where `batch` is split.
    """
    found = log_likelihood(head, hidden, jnp.asarray(batch.targets))
    weights = jnp.asarray(batch.weights).astype(found.log_probs.dtype)
    loss = -found.log_probs
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (found.log_sums - found.means)
    if z_loss:
        loss = loss + z_loss * found.log_sums**2
    return Sums(
        loss=jnp.sum(weights * loss),
        cross_entropy=-jnp.sum(weights * found.log_probs),
        correct=jnp.sum(weights * found.likeliest.astype(weights.dtype)),
        weight=jnp.sum(weights),
    )
