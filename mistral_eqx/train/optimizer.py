"""AdamW with weight decay of matrices alone, and two learning rate schedules."""

import jax
import optax
from jaxtyping import PyTree

from ..checks import Count, CountOrZero, NotNegative, Positive, ShareBelowOne, check_arguments, checked
from ..errors import InputError
from ..nn import Linear, Unembedding


_STEPS = "change the schedule's numbers of steps"


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: NotNegative = 0.1,
    b1: ShareBelowOne = 0.9,
    b2: ShareBelowOne = 0.95,
    eps: Positive = 1e-8,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay ([Loshchilov and Hutter](https://arxiv.org/abs/1711.05101)), of matrices alone.

    The step clips the gradients, for every optimizer: only the step knows how they are sharded.

    **Arguments:**

    - `learning_rate`: a number, or a schedule such as `warmup_cosine`.
    - `weight_decay`: a step subtracts `learning_rate * weight_decay` times the weight; see
        [`mistral_eqx.train.decayed`][].
    - `b1`, `b2`: decay rates of the first and the second moment.
    - `eps`: added to the root of the second moment.

    **Returns:** an optax transformation, for the weights of any model.
    """
    if not callable(learning_rate):
        checked(learning_rate, NotNegative, "learning_rate")
    check_arguments(adamw, weight_decay=weight_decay, b1=b1, b2=b2, eps=eps)
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate),
    )


def decayed(weights: PyTree) -> PyTree[bool]:
    """Which weights are decayed: the matrices of linear layers and of the head.

    Weights of norms are not decayed: they are factors around one. Embeddings are not decayed either: only a token's own
    gradients move its row, so decay would shrink the rows of rare tokens between two appearances. A table that is also
    the head counts as an embedding. minGPT makes the same choice.
    """

    def of(node: PyTree) -> PyTree[bool]:
        return jax.tree.map(lambda _: _is_matrix(node), node)

    return jax.tree.map(of, weights, is_leaf=_is_matrix)


def _is_matrix(node: PyTree) -> bool:
    return isinstance(node, Linear | Unembedding)


def warmup_cosine(peak: Positive, *, warmup: CountOrZero, steps: Count, end: NotNegative = 0.0) -> optax.Schedule:
    """Rises linearly to `peak` in `warmup` steps, then falls to `end` at `steps` along half a cosine
    ([SGDR](https://arxiv.org/abs/1608.03983))."""
    check_arguments(warmup_cosine, peak=peak, warmup=warmup, steps=steps, end=end)
    _check(end <= peak, f"The end {end} is above the peak {peak}", "take a smaller end")
    _check(warmup < steps, f"{warmup} steps of warmup leave none of {steps}", _STEPS)
    return optax.join_schedules(
        [_rise(peak, warmup), optax.cosine_decay_schedule(peak, steps - warmup, end / peak)], [warmup]
    )


def wsd(peak: Positive, *, warmup: CountOrZero, decay: Count, steps: Count, end: NotNegative = 0.0) -> optax.Schedule:
    """Rises linearly to `peak` in `warmup` steps, stays there, and falls linearly to `end` in the last `decay` steps
    ([warmup, stable, decay](https://arxiv.org/abs/2404.06395)). Training can continue from the stable part."""
    check_arguments(wsd, peak=peak, warmup=warmup, decay=decay, steps=steps, end=end)
    _check(end <= peak, f"The end {end} is above the peak {peak}", "take a smaller end")
    _check(warmup + decay <= steps, f"{warmup} + {decay} steps are not within {steps}", _STEPS)
    return optax.join_schedules(
        [_rise(peak, warmup), optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)],
        [warmup, steps - decay],
    )


def _rise(peak: float, warmup: int) -> optax.Schedule:
    # A first step with a learning rate of 0 would change nothing.
    return optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))


def _check(holds: bool, problem: str, remedy: str):
    if not holds:
        raise InputError(f"{problem}; {remedy}.")
