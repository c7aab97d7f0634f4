"""AdamW whose decay is chosen by what a weight does, and two schedules."""

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

    Gradients are clipped by the step, which knows how they are split over devices: there all optimizers are alike.

    **Arguments:**

    - `learning_rate`: a number, or a schedule such as `warmup_cosine`.
    - `weight_decay`: how much of a weight is taken away in a step, times the learning rate; see
        [`mistral_eqx.train.decayed`][].
    - `b1`, `b2`, `eps`: of the running means of gradients and of their squares.

    **Returns:** a transformation of optax, for the weights of any model.
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
    """Which weights are decayed: the matrices that activations are multiplied with, in linear layers and the head.

    Decay pulls a matrix towards zero where the data do not hold it, and so keeps the map from being larger than it need
    be. A norm's weights are factors around one, and an embedding's row is a point that only its own token's gradients
    move: decay would shrink rare tokens' rows between two of their appearances. A table that is the head as well counts
    as an embedding. minGPT chooses alike.
    """

    def of(node: PyTree) -> PyTree[bool]:
        return jax.tree.map(lambda _: _is_matrix(node), node)

    return jax.tree.map(of, weights, is_leaf=_is_matrix)


def _is_matrix(node: PyTree) -> bool:
    return isinstance(node, Linear | Unembedding)


def warmup_cosine(peak: Positive, *, warmup: CountOrZero, steps: Count, end: NotNegative = 0.0) -> optax.Schedule:
    """Rises in a line to `peak` in `warmup` steps, then falls to `end` at `steps` along half a cosine
    ([SGDR](https://arxiv.org/abs/1608.03983))."""
    check_arguments(warmup_cosine, peak=peak, warmup=warmup, steps=steps, end=end)
    _check(end <= peak, f"The end {end} is above the peak {peak}", "take a smaller end")
    _check(warmup < steps, f"{warmup} steps of warmup leave none of {steps}", _STEPS)
    return optax.join_schedules(
        [_rise(peak, warmup), optax.cosine_decay_schedule(peak, steps - warmup, end / peak)], [warmup]
    )


def wsd(peak: Positive, *, warmup: CountOrZero, decay: Count, steps: Count, end: NotNegative = 0.0) -> optax.Schedule:
    """Rises in a line to `peak` in `warmup` steps, stays, and falls in a line to `end` in the last `decay` steps
    ([warmup, stable, decay](https://arxiv.org/abs/2404.06395)). Training can go on from the stable part."""
    check_arguments(wsd, peak=peak, warmup=warmup, decay=decay, steps=steps, end=end)
    _check(end <= peak, f"The end {end} is above the peak {peak}", "take a smaller end")
    _check(warmup + decay <= steps, f"{warmup} + {decay} steps are not within {steps}", _STEPS)
    return optax.join_schedules(
        [_rise(peak, warmup), optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)],
        [warmup, steps - decay],
    )


def _rise(peak: float, warmup: int) -> optax.Schedule:
    # The first step is not wasted on a learning rate of nothing.
    return optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))


def _check(holds: bool, problem: str, remedy: str):
    if not holds:
        raise InputError(f"{problem}; {remedy}.")
