"""The loss of a model on a batch."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..nn import Unembedding, log_likelihood
from .batch import Batch


class Sums(NamedTuple):
    """Weighted sums over tokens, not means: add up the sums of micro-batches, and divide once by the total weight.

    **Attributes:**

    - `loss`: the loss that training minimises.
    - `cross_entropy`: the negative log-probabilities of the targets, without label smoothing and z-loss.
    - `correct`: the weights of the targets that are the most likely token; of equally likely tokens the first counts.
    - `weight`: the weights of all tokens.
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

    With probabilities `p`, a vocabulary of `V` tokens and the sum of exponentiated logits `Z`, the loss of a token is
    `-(1 - label_smoothing) log p[target] - label_smoothing / V Σ log p + z_loss (log Z)²`
    ([label smoothing, section 7](https://arxiv.org/abs/1512.00567), [z-loss, section 5](https://arxiv.org/abs/2204.02311)).

    **Arguments:**

    - `head`: the output head.
    - `hidden`: the last hidden states, the input of the head.
    - `batch`: the targets and their weights.
    - `label_smoothing`: the part of a target's probability that is spread over all tokens.
    - `z_loss`: the weight of the term that keeps logits from drifting; PaLM takes 1e-4.

    **Returns:** the sums; over this device's rows alone if `batch` is split.
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
