"""One step of training, compiled as a whole and run inside one `shard_map`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from ..nn import Mistral
from ..parallel import Strategy, psum, psum_varying, specs, spmd, vary_alike
from .batch import Batch
from .loss import Sums, loss_sums
from .scan import Stacked, stack, trained, unstack


class TrainState(eqx.Module):
    """All that one step hands to the next.

    **Attributes:**

    - `model`: the weights, in the precision in which they are kept.
    - `optimizer_state`: of the optimizer, split as the weights are.
    - `steps`: how many steps were made, those that were skipped included.
    - `skipped`: how many changed nothing, since the loss or a gradient was not finite.
    """

    model: Stacked
    optimizer_state: PyTree
    steps: Int[Array, ""]
    skipped: Int[Array, ""]

    @classmethod
    def init(
        cls, model: Mistral, optimizer: optax.GradientTransformation, *, dtype: DTypeLike = jnp.float32
    ) -> "TrainState":
        """The state before the first step.

        **Arguments:**

        - `model`: on one device or on a mesh, where the state is split as the model is. It is copied.
        - `optimizer`: any transformation of optax that treats each number by itself; one that looks at a whole array
            would see a device's part of it.
        - `dtype`: in which weights and optimizer state are kept. Products may be in less: see
            [`mistral_eqx.train.make_step`][].
        """

        def build(model: Mistral) -> TrainState:
            weights, constants = eqx.partition(stack(model), trained(stack(model)))
            # Rotary angles are never in less than float32.
            stacked = eqx.combine(_cast(weights, dtype), _cast(constants, jnp.promote_types(dtype, jnp.float32)))
            zero = jnp.zeros((), jnp.int32)
            return cls(stacked, optimizer.init(eqx.filter(stacked, trained(stacked))), zero, zero)

        shape = eqx.filter_eval_shape(build, model)
        place = shape.specs(optimizer)
        make = spmd(
            lambda model: eqx.filter(build(model), eqx.is_array), model.mesh, (specs(model, model.strategy),), place
        )
        return eqx.combine(eqx.filter_jit(make)(model), _static(shape))

    @property
    def strategy(self) -> Strategy:
        """Which dimensions are split over which axes of the mesh."""
        return self.model.outer.strategy

    def unstacked(self) -> Mistral:
        """The model, for generating and for writing to a file."""
        return unstack(self.model)

    def specs(self, optimizer: optax.GradientTransformation) -> "TrainState":
        """How each array is split over the mesh; what the optimizer keeps of a weight, as the weight is."""
        model = self.model.specs(self.strategy)
        optimizer_state = optax.tree.map_params(
            optimizer,
            lambda _, spec: spec,
            self.optimizer_state,
            eqx.filter(model, trained(self.model)),
            transform_non_params=lambda _: PartitionSpec(),
        )
        return eqx.tree_at(
            lambda state: (state.model, state.optimizer_state, state.steps, state.skipped),
            self,
            (model, optimizer_state, PartitionSpec(), PartitionSpec()),
        )


class Metrics(NamedTuple):
    """What is known of a step; means are over the weight of the whole batch.

    **Attributes:**

    - `loss`, `cross_entropy`, `accuracy`: means of [`mistral_eqx.train.Sums`][].
    - `weight`: of the tokens that counted.
    - `gradient_norm`: the root of the sum of all gradients' squares, before it was clipped.
    - `finite`: whether loss and gradients were, and the step was made.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    accuracy: Float[Array, ""]
    weight: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    finite: Array


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(
    optimizer: optax.GradientTransformation,
    *,
    compute_dtype: DTypeLike | None = jnp.bfloat16,
    accumulate: int = 1,
    clip: float | None = 1.0,
    remat: str = "block",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Step:
    """A function that makes one step: `state, metrics = step(state, batch)`.

    The state that goes in is donated: its memory becomes that of the one that comes out, and it cannot be used again.

    **Arguments:**

    - `optimizer`: the one that the state was made with.
    - `compute_dtype`: what the weights are cast to for the forward and backward pass; `None` leaves them as they are.
        bfloat16 has the range of float32, so that small gradients do not vanish and no loss scale is needed.
    - `accumulate`: in how many parts the rows of a batch are gone through, one after the other; memory for activations
        is that of one part. Gradients are added up in the weights' precision.
    - `clip`: the largest norm of all gradients together; larger ones are shrunk to it.
    - `remat`: what is computed again in the backward pass; see [`mistral_eqx.train.Stacked.hidden`][].
    - `label_smoothing`, `z_loss`: as of [`mistral_eqx.train.loss_sums`][].

    **Returns:** the function. It raises `ValueError` if the rows of a batch cannot be cut into as many parts.
    """
    if accumulate < 1:
        raise ValueError(f"A batch cannot be gone through in {accumulate} parts; accumulate must be at least 1.")

    def on_device(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        strategy = state.strategy
        weights, constants = eqx.partition(state.model, trained(state.model))
        gradient, sums = _gradient(
            partial(_loss, constants=constants, remat=remat, label_smoothing=label_smoothing, z_loss=z_loss),
            weights,
            batch,
            strategy,
            compute_dtype,
            accumulate,
        )
        norm = jnp.sqrt(psum_varying([jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)]))
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(norm)
        if clip is not None:
            shrink = jnp.minimum(1, clip / norm)
            gradient = jax.tree.map(lambda leaf: leaf * shrink.astype(leaf.dtype), gradient)
        with jax.numpy_dtype_promotion("standard"):  # optax takes powers of floats by integers
            updates, optimizer_state = optimizer.update(cast(Any, gradient), state.optimizer_state, weights)
        made = eqx.apply_updates(weights, updates), optimizer_state
        weights, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), made, (weights, state.optimizer_state)
        )
        state = TrainState(
            eqx.combine(weights, constants),
            optimizer_state,
            state.steps + 1,
            state.skipped + (1 - finite.astype(jnp.int32)),
        )
        means = [part / sums.weight for part in (sums.loss, sums.cross_entropy, sums.correct)]
        loss, cross_entropy, accuracy = means
        return eqx.filter(state, eqx.is_array), Metrics(loss, cross_entropy, accuracy, sums.weight, norm, finite)

    @partial(eqx.filter_jit, donate="all-except-first")
    def compiled(batch: Batch, state: TrainState) -> tuple[TrainState, Metrics]:
        strategy, mesh = state.strategy, state.model.outer.mesh
        place, rows = state.specs(optimizer), strategy.spec("batch")
        made, metrics = spmd(on_device, mesh, (place, rows), (place, PartitionSpec()))(state, batch)
        return eqx.combine(made, _static(state)), metrics

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        mesh, axes = state.model.outer.mesh, state.strategy.split_over("batch")
        devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
        parts = accumulate * devices
        if batch.inputs.shape[0] % parts:
            raise ValueError(
                f"{batch.inputs.shape[0]} rows cannot be cut into {parts} equal parts, by accumulation times the "
                "devices that share a batch; give a multiple."
            )
        return compiled(jax.tree.map(jnp.asarray, batch), state)

    return step


def _loss(
    weights: Stacked, batch: Batch, *, constants: Stacked, remat: str, label_smoothing: float, z_loss: float
) -> Sums:
    model = eqx.combine(weights, constants)
    hidden = model.hidden(batch, remat=remat)
    return loss_sums(model.head, hidden, batch, label_smoothing=label_smoothing, z_loss=z_loss)


def _gradient(
    loss: Callable[[Stacked, Batch], Sums],
    weights: Stacked,
    batch: Batch,
    strategy: Strategy,
    compute_dtype: DTypeLike | None,
    accumulate: int,
) -> tuple[Stacked, Sums]:
    """The gradient of the mean loss over the whole batch, on all devices, in the weights' precision; and the sums."""
    # Each part is divided by the weight of all of them, so that parts of unequal weight add up to the whole.
    total = psum(jnp.sum(batch.weights), "batch", strategy)
    light = weights if compute_dtype is None else _cast(weights, compute_dtype)

    def mean(light: Stacked, part: Batch) -> tuple[Float[Array, ""], Sums]:
        sums = loss(light, part)
        return sums.loss / total.astype(sums.loss.dtype), sums

    def add(so_far: tuple[Stacked, Sums], part: Batch) -> tuple[tuple[Stacked, Sums], None]:
        more, sums = jax.grad(mean, has_aux=True)(light, part)
        more = jax.tree.map(lambda leaf, weight: leaf.astype(weight.dtype), more, weights)
        return jax.tree.map(jnp.add, so_far, (more, sums)), None

    parts = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), batch)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(mean, light, first)[1]
    start = (
        jax.tree.map(lambda leaf: vary_alike(jnp.zeros_like(leaf), leaf)[0], weights),
        jax.tree.map(lambda sum: vary_alike(jnp.zeros(sum.shape, sum.dtype), jnp.asarray(batch.weights))[0], shapes),
    )
    (gradient, sums), _ = lax.scan(add, start, parts)
    return gradient, jax.tree.map(lambda sum: psum(sum, "batch", strategy), sums)


def _cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """The floats of a tree in another precision."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)


def _static(tree: PyTree) -> PyTree:
    """All that is no array, nor the shape of one."""
    return jax.tree.map(
        lambda leaf: None if eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) else leaf, tree
    )
