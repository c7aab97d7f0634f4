"""One step of training, compiled as a whole and run inside one `shard_map`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..checks import Count, NotNegative, Positive, Seed, ShareBelowOne, check_arguments
from ..errors import InputError
from ..nn import Gathering, Mistral, Stacked, stack, unstack
from ..parallel import Strategy, place, psum, psum_varying, specs, spmd, vary_alike
from .batch import Batch
from .dropout import with_dropout
from .loss import Sums, loss_sums
from .offload import check_host, to_device, to_host
from .remat import rematerialised
from .trained import cast_floats, trained
from .zero import Zero


class TrainState(eqx.Module):
    """All that one step hands to the next.

    **Attributes:**

    - `model`: the weights, in the precision in which they are kept.
    - `optimizer_state`: of the optimizer, split as the weights are.
    - `steps`: how many steps were made, those that were skipped included.
    - `skipped`: how many changed nothing, since the loss or a gradient was not finite.
    - `zero`: how much of it is split over the devices that share a batch.
    - `offload`: whether the optimizer's state is kept in the host's memory.
    """

    model: Stacked
    optimizer_state: PyTree
    steps: Int[Array, ""]
    skipped: Int[Array, ""]
    zero: Zero = eqx.field(static=True, default=Zero())
    offload: bool = eqx.field(static=True, default=False)

    @classmethod
    def init(
        cls,
        model: Mistral,
        optimizer: optax.GradientTransformation,
        *,
        dtype: DTypeLike = jnp.float32,
        zero: int = 0,
        offload: bool = False,
    ) -> "TrainState":
        """The state before the first step.

        **Arguments:**

        - `model`: on one device or on a mesh, where the state is split as the model is. It is copied.
        - `optimizer`: any transformation of optax that treats each number by itself; one that looks at a whole array
            would see a device's part of it.
        - `dtype`: in which trained weights and optimizer state are kept. Products may be in less: see
            [`mistral_eqx.train.make_step`][].
        - `zero`: the stage of [`mistral_eqx.train.Zero`][].
        - `offload`: keeps the optimizer's state in the host's memory; a step brings it to the device for the update.
            The numbers are the same, and each step takes the time to move them there and back.

        **Raises:** `ValueError` if there is no such stage, nothing to split the state over, or the devices do not
        reach the host's memory.
        """
        stage = Zero.init(zero, model.mesh, model.strategy)
        if offload:
            check_host(model.mesh)

        def build(model: Mistral, cuts: Stacked | None = None) -> TrainState:
            stacked = stack(model)
            weights, constants = eqx.partition(stacked, trained(stacked))
            weights = cast_floats(weights, dtype)  # what is not trained stays as it is stored
            parts = weights if cuts is None else stage.own(weights, eqx.filter(cuts, trained(stacked)))
            kept = eqx.combine(weights, constants)
            if stage.stage == 3 and cuts is not None:
                arrays, static = eqx.partition(kept, eqx.is_array)
                kept = eqx.combine(stage.own(arrays, cuts), static)
            none = jnp.zeros((), jnp.int32)
            return cls(kept, optimizer.init(parts), none, none, stage, offload)

        shape = eqx.filter_eval_shape(build, model)
        place, cuts = shape.specs(optimizer), shape.cuts()
        make = spmd(
            lambda model: eqx.filter(build(model, cuts), eqx.is_array),
            model.mesh,
            (specs(model, model.strategy),),
            place,
        )
        return eqx.combine(eqx.filter_jit(lambda model: _put_away(make(model)))(model), _static(shape))

    @property
    def strategy(self) -> Strategy:
        """Which dimensions are split over which axes of the mesh."""
        return self.model.outer.strategy

    def unstacked(self) -> Mistral:
        """The model, for generating and for writing to a file."""
        return unstack(self.model)

    def specs(self, optimizer: optax.GradientTransformation) -> "TrainState":
        """How each array is split over the mesh; what the optimizer keeps of a weight, as the weight is."""
        parts = self.zero.specs(self.model.specs(self.strategy), self.cuts())
        optimizer_state = optax.tree.map_params(
            optimizer,
            lambda _, spec: spec,
            self.optimizer_state,
            eqx.filter(parts, trained(self.model)),
            transform_non_params=lambda _: PartitionSpec(),
        )
        return eqx.tree_at(
            lambda state: (state.model, state.optimizer_state, state.steps, state.skipped),
            self,
            (self.model_specs(), optimizer_state, PartitionSpec(), PartitionSpec()),
        )

    def model_specs(self) -> Stacked:
        """How each array of the model is split over the mesh."""
        whole = self.model.specs(self.strategy)
        return self.zero.specs(whole, self.cuts()) if self.zero.stage == 3 else whole

    def cuts(self) -> Stacked:
        """Along which dimension each array is cut over the devices that share a batch, or -1."""
        return self.zero.cuts(self.model, self.model.specs(self.strategy), self.model.outer.mesh)


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
    accumulate: Count = 1,
    clip: Positive | None = 1.0,
    remat: str = "block",
    label_smoothing: ShareBelowOne = 0.0,
    z_loss: NotNegative = 0.0,
    seed: Seed = 0,
) -> Step:
    """A function that makes one step: `state, metrics = step(state, batch)`.

    The state that goes in is donated: its memory becomes that of the one that comes out, and it cannot be used again.

    **Arguments:**

    - `optimizer`: the one that the state was made with.
    - `compute_dtype`: what the trained weights are cast to for the forward and backward pass; `None` leaves them as
        they are, and so are those always that adapters leave untrained: their precision is that of the activations.
        bfloat16 has the range of float32, so that small gradients do not vanish and no loss scale is needed.
    - `accumulate`: in how many parts the rows of a batch are gone through, one after the other; memory for activations
        is that of one part. Gradients are added up in the weights' precision.
    - `clip`: the largest norm of all gradients together; larger ones are shrunk to it.
    - `remat`: what is computed again in the backward pass; see [`mistral_eqx.train.rematerialised`][].
    - `label_smoothing`, `z_loss`: as of [`mistral_eqx.train.loss_sums`][].
    - `seed`: of the dropout of adapters, if they have any. What is dropped follows from it, from the number of the step
        and from the row of the batch: so it is the same on every mesh, in however many parts a batch is gone through,
        and after a state was saved and loaded.

    **Returns:** the function. It raises `ValueError` if the rows of a batch cannot be cut into as many parts.
    """
    check_arguments(
        make_step,
        accumulate=accumulate,
        clip=clip,
        remat=remat,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        seed=seed,
    )
    wrapped = rematerialised(remat)

    def on_device(state: TrainState, batch: Batch, *, cuts: Stacked) -> tuple[TrainState, Metrics]:
        strategy, zero = state.strategy, state.zero
        weights, constants = eqx.partition(state.model, trained(state.model))
        options = {"wrapped": wrapped, "label_smoothing": label_smoothing, "z_loss": z_loss}
        # Dropout hashes with threefry, whatever generator is the process's default.
        key = jr.fold_in(jr.key(seed, impl="threefry2x32"), state.steps)
        loss = partial(_loss, constants=constants, key=key, gathering=zero.gathering(cuts), **options)
        cuts = eqx.filter(cuts, trained(state.model))
        gradient, sums = _gradient(loss, weights, batch, strategy, compute_dtype, accumulate, zero, cuts)
        if zero.stage in (1, 2):
            # From here on they are those that this device updates.
            weights = zero.own(weights, cuts)
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
        if zero.stage in (1, 2):
            weights = zero.gather(weights, cuts, to="invarying")
        state = TrainState(
            eqx.combine(weights, constants),
            optimizer_state,
            state.steps + 1,
            state.skipped + (1 - finite.astype(jnp.int32)),
            zero,
            state.offload,
        )
        means = [part / sums.weight for part in (sums.loss, sums.cross_entropy, sums.correct)]
        loss, cross_entropy, accuracy = means
        return eqx.filter(state, eqx.is_array), Metrics(loss, cross_entropy, accuracy, sums.weight, norm, finite)

    @partial(eqx.filter_jit, donate="all-except-first")
    def compiled(batch: Batch, state: TrainState) -> tuple[TrainState, Metrics]:
        strategy, mesh = state.strategy, state.model.outer.mesh
        if state.zero.stage == 3 and remat == "none":
            raise InputError(
                "ZeRO 3 lets go of a layer's weights and gathers them again for the backward pass, which remat='none' "
                "forbids; take 'block' or 'dots'."
            )
        place, rows = state.specs(optimizer), strategy.spec("batch")
        run = partial(on_device, cuts=state.cuts())
        state = _fetched(state)
        made, metrics = spmd(run, mesh, (place, rows), (place, PartitionSpec()))(state, batch)
        return eqx.combine(_put_away(made), _static(state)), metrics

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        parts = accumulate * state.strategy.parts("batch", state.model.outer.mesh)
        if batch.inputs.shape[0] % parts:
            raise InputError(
                f"{batch.inputs.shape[0]} rows cannot be cut into {parts} equal parts, by accumulation times the "
                "devices that share a batch; give a multiple."
            )
        return compiled(jax.tree.map(jnp.asarray, batch), state)

    return step


def _loss(
    weights: Stacked,
    batch: Batch,
    rows: Int[Array, " batch"],
    *,
    constants: Stacked,
    key: PRNGKeyArray,
    gathering: Gathering,
    wrapped: Callable[..., Any],
    label_smoothing: float,
    z_loss: float,
) -> Sums:
    model = with_dropout(eqx.combine(weights, constants), key, rows)
    hidden = model.hidden(batch.inputs, batch.positions, batch.span, wrapped=wrapped, gathering=gathering)
    return loss_sums(model.head(gathering), hidden, batch, label_smoothing=label_smoothing, z_loss=z_loss)


def _gradient(
    loss: Callable[[Stacked, Batch, Int[Array, " batch"]], Sums],
    weights: Stacked,
    batch: Batch,
    strategy: Strategy,
    compute_dtype: DTypeLike | None,
    accumulate: int,
    zero: Zero,
    cuts: Stacked,
) -> tuple[Stacked, Sums]:
    """The gradient of the mean loss over the whole batch, in the weights' precision; and the sums.

    Of weights that are split or are to be updated in parts, each device has its part of the gradient.
    """
    # Each part is divided by the weight of all of them, so that parts of unequal weight add up to the whole.
    total = psum(jnp.sum(batch.weights), "batch", strategy)
    # Each device takes the gradient of its own rows, and these are added up once, in the weights' precision.
    own = weights if zero.stage == 3 else zero.vary(weights)
    light = own if compute_dtype is None else cast_floats(own, compute_dtype)

    def mean(light: Stacked, part: tuple[Batch, Array]) -> tuple[Float[Array, ""], Sums]:
        sums = loss(light, *part)
        return sums.loss / total.astype(sums.loss.dtype), sums

    def add(so_far: tuple[Stacked, Sums], part: tuple[Batch, Array]) -> tuple[tuple[Stacked, Sums], None]:
        more, sums = jax.grad(mean, has_aux=True)(light, part)
        more = jax.tree.map(lambda leaf, weight: leaf.astype(weight.dtype), more, weights)
        if zero.stage == 2:
            more = zero.scatter(more, cuts)
        return jax.tree.map(jnp.add, so_far, (more, sums)), None

    count = batch.inputs.shape[0]
    rows = place("batch", strategy)[0] * count + jnp.arange(count, dtype=jnp.int32)
    parts = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), (batch, rows))
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(mean, light, first)[1]
    # Gradients of the second stage are kept in parts from the first one on.
    like = zero.own(weights, cuts) if zero.stage == 2 else own
    start = (
        jax.tree.map(lambda leaf: vary_alike(jnp.zeros_like(leaf), leaf)[0], like),
        jax.tree.map(lambda sum: vary_alike(jnp.zeros(sum.shape, sum.dtype), jnp.asarray(batch.weights))[0], shapes),
    )
    (gradient, sums), _ = lax.scan(add, start, parts)
    if zero.stage < 2:
        gradient = zero.sum(gradient)
    if zero.stage == 1:
        gradient = zero.own(gradient, cuts)
    return gradient, jax.tree.map(lambda sum: psum(sum, "batch", strategy), sums)


def _fetched(state: TrainState) -> TrainState:
    """The state as the update takes it. Between memories whole arrays are moved: this is outside of `shard_map`."""
    return eqx.tree_at(_optimizer_state, state, replace_fn=to_device) if state.offload else state


def _put_away(state: TrainState) -> TrainState:
    """The state as it is kept until the next step."""
    return eqx.tree_at(_optimizer_state, state, replace_fn=to_host) if state.offload else state


def _optimizer_state(state: TrainState) -> PyTree:
    return state.optimizer_state


def _static(tree: PyTree) -> PyTree:
    """All that is no array, nor the shape of one."""
    return jax.tree.map(
        lambda leaf: None if eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) else leaf, tree
    )
