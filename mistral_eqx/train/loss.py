"""The loss of a model on a batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..nn import RouterSums, Unembedding, log_likelihood
from ..parallel import Strategy, of_last_stage, own_slices, psum
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
    - `hidden`: the last hidden states, the input of the head; where `seq` is split, of this device's tokens.
    - `batch`: the targets and their weights.
    - `label_smoothing`: the part of a target's probability that is spread over all tokens.
    - `z_loss`: the weight of the term that keeps logits from drifting; PaLM takes 1e-4.

    **Returns:** the sums; over this device's rows and tokens alone if `batch` or `seq` is split. If `layers` is split,
    they are 0 but on the last stage, whose activations are the last ones.
    """
    targets, weights = (own_slices(jnp.asarray(x), head.strategy, axis=1) for x in (batch.targets, batch.weights))
    found = log_likelihood(head, hidden, targets)
    weights = of_last_stage(weights.astype(found.log_probs.dtype), head.strategy)
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


class RouterLosses(NamedTuple):
    """The losses of routers and what a capacity drops, as means over the tokens of all layers.

    With `E` experts, the fraction `f_e` of tokens that chose an expert, and its mean probability `P_e`:

    **Attributes:**

    - `balance`: `E Σ_e f_e P_e` ([Switch Transformer](https://arxiv.org/abs/2101.03961)). It is the number of experts
        per token if all experts are chosen alike, and `E` if all tokens choose the same ones.
    - `z`: the mean of `(log Σ_e exp(score_e))²` ([ST-MoE](https://arxiv.org/abs/2202.08906)).
    - `dropped`: the fraction of the choices that were dropped, which is no loss; `None` without a capacity.
    """

    balance: Float[Array, ""]
    z: Float[Array, ""]
    dropped: Float[Array, ""] | None


def router_losses(sums: RouterSums, shares: Float[Array, " micro_batches"], strategy: Strategy) -> RouterLosses:
    """This device's terms of the losses of routers: their sum over devices and micro-batches is the loss of the batch.

    The fractions `f_e` are those of one micro-batch, over all devices, and micro-batches count as their tokens.

    **Arguments:**

    - `sums`: for each micro-batch, the sums over the tokens of this device's rows.
    - `shares`: the tokens of each micro-batch, over all devices, divided by those of the whole batch;
        in the precision of the sums.
    - `strategy`: which dimensions are split over which mesh axes. If `layers` is split, only the last stage has terms.
    """
    tokens = jnp.maximum(psum(sums.tokens, "batch seq", strategy), 1)
    # Between stages, all sums are one array: to JAX, choices then depend on the weights too.
    chosen = lax.stop_gradient(psum(sums.chosen, "batch seq", strategy))
    balance = chosen.shape[-1] * jnp.sum(chosen * sums.probabilities, axis=-1) / tokens
    scale = shares / tokens
    dropped = None if sums.dropped is None else jnp.sum(scale * sums.dropped)
    losses = RouterLosses(jnp.sum(scale * balance), jnp.sum(scale * sums.squares), dropped)
    return jax.tree.map(lambda loss: of_last_stage(loss, strategy), losses)
