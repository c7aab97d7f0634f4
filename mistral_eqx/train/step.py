"""One training step, compiled as a whole and run inside one `shard_map`."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

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
from ..nn import Gathering, Mistral, Passed, RouterSums, Stacked, one_forward_one_backward, stack, unstack
from ..parallel import (
    Strategy,
    of_last_stage,
    own_slices,
    psum,
    psum_varying,
    shard_index,
    specs,
    spmd,
    vary_alike,
)
from ..parallel.codes import NO_GRADIENT
from .batch import Batch
from .capacity import with_capacity
from .dropout import with_dropout
from .loss import RouterLosses, Sums, loss_sums, router_losses
from .offload import check_host, to_device, to_host
from .remat import rematerialised
from .trained import cast_floats, trained
from .zero import Zero


class TrainState(eqx.Module):
    """The state of training between two steps.

    **Attributes:**

    - `model`: the model, with master weights.
    - `optimizer_state`: the optimizer state.
    - `steps`: the number of steps, skipped ones included.
    - `skipped`: the number of steps that changed nothing, because the loss or the gradient norm was not finite.
    - `zero`: how much of the state is sharded over the devices that share a batch.
    - `offload`: whether the optimizer state is kept in host memory.
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
        model: Mistral | Stacked,
        optimizer: optax.GradientTransformation,
        *,
        dtype: DTypeLike = jnp.float32,
        zero: int = 0,
        offload: bool = False,
    ) -> "TrainState":
        """The state before the first step.

        **Arguments:**

        - `model`: a model on one device or on a mesh; the state is sharded like the model. The model is copied. Its
            blocks may be stacked, as they are where the strategy splits `layers`.
        - `optimizer`: any elementwise optax transformation; one that reduces over a whole array would reduce over a
            device's shard.
        - `dtype`: the precision of master weights and optimizer state. Forward and backward pass may use less; see
            [`mistral_eqx.train.make_step`][].
        - `zero`: the stage of [`mistral_eqx.train.Zero`][].
        - `offload`: keeps the optimizer state in host memory; a step moves it to the device for the update. The
            results are the same, and each step takes longer by the two transfers.

        **Raises:** `ValueError` if weights are quantized without adapters beside them, there is no such stage, the
        strategy does not split the batch or has the word `exchange`, or the devices cannot access host memory.
        """
        if model.strategy.exchange:
            raise InputError(NO_GRADIENT)
        stage = Zero.init(zero, model.mesh, model.strategy)
        if offload:
            check_host(model.mesh)

        def build(model: Mistral | Stacked, shard_dims: Stacked | None = None) -> TrainState:
            stacked = stack(model) if isinstance(model, Mistral) else model
            weights, constants = eqx.partition(stacked, trained(stacked))
            weights = cast_floats(weights, dtype)  # weights that are not trained keep their precision
            shards = weights
            if shard_dims is not None:
                shards = stage.own_shards(weights, eqx.filter(shard_dims, trained(stacked)))
            stored = eqx.combine(weights, constants)
            if stage.stage == 3 and shard_dims is not None:
                arrays, static = eqx.partition(stored, eqx.is_array)
                stored = eqx.combine(stage.own_shards(arrays, shard_dims), static)
            zeros = jnp.zeros((), jnp.int32)
            return cls(stored, optimizer.init(shards), zeros, zeros, stage, offload)

        shape = eqx.filter_eval_shape(build, model)
        state_specs, shard_dims = shape.specs(optimizer), shape.shard_dims()
        make = spmd(
            lambda model: eqx.filter(build(model, shard_dims), eqx.is_array),
            model.mesh,
            (specs(model, model.strategy),),
            state_specs,
        )
        return eqx.combine(eqx.filter_jit(lambda model: _between_steps(make(model)))(model), _static(shape))

    @property
    def strategy(self) -> Strategy:
        """Which dimensions are split over which axes of the mesh."""
        return self.model.outer.strategy

    def unstacked(self) -> Mistral:
        """The model, to generate with or to save."""
        return unstack(self.model)

    def specs(self, optimizer: optax.GradientTransformation) -> "TrainState":
        """The PartitionSpec of each array; the optimizer state has those of the ZeRO shards of its weights."""
        shards = self.zero.specs(specs(self.model, self.strategy), self.shard_dims())
        optimizer_state = optax.tree.map_params(
            optimizer,
            lambda _, spec: spec,
            self.optimizer_state,
            eqx.filter(shards, trained(self.model)),
            transform_non_params=lambda _: PartitionSpec(),
        )
        return eqx.tree_at(
            lambda state: (state.model, state.optimizer_state, state.steps, state.skipped),
            self,
            (self.model_specs(), optimizer_state, PartitionSpec(), PartitionSpec()),
        )

    def model_specs(self) -> Stacked:
        """The PartitionSpec of each array of the model."""
        whole = specs(self.model, self.strategy)
        return self.zero.specs(whole, self.shard_dims()) if self.zero.stage == 3 else whole

    def shard_dims(self) -> Stacked:
        """How ZeRO shards each array."""
        return self.zero.shard_dims(self.model, specs(self.model, self.strategy), self.model.outer.mesh)


class Metrics(NamedTuple):
    """The metrics of a step; means are weighted means over the whole batch.

    **Attributes:**

    - `loss`, `cross_entropy`, `accuracy`: means of [`mistral_eqx.train.Sums`][].
    - `weight`: the sum of the weights of the tokens.
    - `gradient_norm`: the global norm of the gradients, before clipping.
    - `finite`: whether the loss and the gradient norm were finite; otherwise the step was skipped.
    - `router_balance`, `router_z`: the [`mistral_eqx.train.RouterLosses`][] of a model with experts, without their
        weights; otherwise 0.
    - `router_dropped`: the fraction of the choices of routers that `capacity` dropped; 0 without it.
    """

    loss: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    accuracy: Float[Array, ""]
    weight: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    finite: Array
    router_balance: Float[Array, ""]
    router_z: Float[Array, ""]
    router_dropped: Float[Array, ""]


_Losses = tuple[Sums, RouterLosses | None]
Schedule = Literal["gpipe", "1f1b"]
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
    balance_loss: NotNegative = 0.0,
    router_z_loss: NotNegative = 0.0,
    capacity: Positive | None = None,
    seed: Seed = 0,
    schedule: Schedule = "gpipe",
) -> Step:
    """Makes the function of one training step: `state, metrics = step(state, batch)`.

    The step donates the given state: the new state uses its memory, and the given state cannot be used again.

    **Arguments:**

    - `optimizer`: the optimizer that the state was made with.
    - `compute_dtype`: the precision of the trained weights in the forward and backward pass; `None` uses the master
        weights as they are. Weights that adapters leave untrained are never cast: activations have their precision.
        bfloat16 has the range of float32, so that small gradients do not vanish and no loss scale is needed.
    - `accumulate`: the number of micro-batches that a batch is split into; activations take the memory of one
        micro-batch. Gradients are accumulated in the precision of the master weights. Where the strategy splits
        `layers`, so many micro-batches pass through the stages, at least as many as there are stages.
    - `clip`: the largest global norm of the gradients; larger gradients are scaled down to it.
    - `remat`: the rematerialisation policy; see [`mistral_eqx.train.rematerialised`][].
    - `label_smoothing`, `z_loss`: as for [`mistral_eqx.train.loss_sums`][].
    - `balance_loss`, `router_z_loss`: the weights of the two [`mistral_eqx.train.RouterLosses`][], which are added to
        the loss. The config of Mixtral 8x7B has 0.02 for the first; ST-MoE takes 0.01 and 0.001.
    - `capacity`: the capacity factor of experts. Of the tokens of a row that chose an expert, the expert computes the
        first `ceil(capacity * per_token * tokens / experts)`, where `tokens` counts those of the row without padding.
        The other choices are dropped, and the shares of a token's other experts stay as they are
        ([Switch Transformer](https://arxiv.org/abs/2101.03961), with the rows as groups of
        [GShard](https://arxiv.org/abs/2006.16668)). `None` drops nothing, as evaluation and generation always do.
    - `seed`: the seed of the dropout of adapters. The dropped entries depend on this seed, the number of the step and
        the batch row alone: they are the same on every mesh, for every `accumulate`, and after a state was saved and
        loaded.
    - `schedule`: the order of micro-batches where the strategy splits `layers`. `"gpipe"` computes all of them forward
        and then all backward, interleaved if the stages have several chunks ([`mistral_eqx.nn.stack`][]); `"1f1b"`
        computes each backward as soon as possible. The latter takes less memory for many micro-batches, and more time.

    **Returns:** the function. It raises `ValueError` if the rows cannot be split evenly into micro-batches on all
    devices.
    """
    check_arguments(
        make_step,
        accumulate=accumulate,
        clip=clip,
        remat=remat,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        balance_loss=balance_loss,
        router_z_loss=router_z_loss,
        capacity=capacity,
        seed=seed,
        schedule=schedule,
    )
    wrapped = rematerialised(remat)
    # An array in the model would be traced.
    capacity = None if capacity is None else float(capacity)

    def on_device(state: TrainState, batch: Batch, *, shard_dims: Stacked) -> tuple[TrainState, Metrics]:
        strategy, zero = state.strategy, state.zero
        weights, constants = eqx.partition(state.model, trained(state.model))
        options = {
            "wrapped": wrapped,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "capacity": capacity,
        }
        staged = bool(strategy.axes("layers"))
        # One gradient is taken through all micro-batches of GPipe.
        in_stages, parts = (accumulate, 1) if staged and schedule == "gpipe" else (1, accumulate)
        # Dropout needs threefry, whichever generator is the default of the process.
        key = jr.fold_in(jr.key(seed, impl="threefry2x32"), state.steps)
        gathering = zero.gathering(shard_dims)
        loss = partial(_loss, constants=constants, key=key, gathering=gathering, micro_batches=in_stages, **options)
        of_stage = partial(_of_stage, constants=constants, key=key, gathering=gathering, **options)
        shard_dims = eqx.filter(shard_dims, trained(state.model))
        weigh = partial(_weighed, balance_loss=balance_loss, router_z_loss=router_z_loss)
        gradient, sums, router = _gradient(
            loss,
            weigh,
            weights,
            batch,
            strategy,
            compute_dtype,
            parts,
            zero,
            shard_dims,
            in_stages,
            of_stage if staged and schedule == "1f1b" else None,
        )
        if zero.stage in (1, 2):
            # The optimizer updates this device's shards alone.
            weights = zero.own_shards(weights, shard_dims)
        norm = jnp.sqrt(psum_varying([jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)]))
        finite = jnp.isfinite(weigh(sums.loss, router)) & jnp.isfinite(norm)

        def update(weights: Any, optimizer_state: PyTree, gradient: Any) -> tuple[Any, PyTree]:
            if clip is not None:
                shrink = jnp.minimum(1, clip / norm)
                gradient = jax.tree.map(lambda leaf: leaf * shrink.astype(leaf.dtype), gradient)
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
                updates, optimizer_state = optimizer.update(gradient, optimizer_state, weights)
            return eqx.apply_updates(weights, updates), optimizer_state

        def keep(weights: Any, optimizer_state: PyTree, _: Any) -> tuple[Any, PyTree]:
            return weights, optimizer_state

        # A select instead would need the old moments after the new ones are there, and so a copy of both.
        weights, optimizer_state = lax.cond(finite, update, keep, weights, state.optimizer_state, gradient)
        if zero.stage in (1, 2):
            weights = zero.gather(weights, shard_dims, to="invarying")
        state = TrainState(
            eqx.combine(weights, constants),
            optimizer_state,
            state.steps + 1,
            state.skipped + (1 - finite.astype(jnp.int32)),
            zero,
            state.offload,
        )
        means = [total / sums.weight for total in (sums.loss, sums.cross_entropy, sums.correct)]
        loss, cross_entropy, accuracy = means
        own = (weigh(loss, router), cross_entropy, accuracy, sums.weight, norm, finite)
        zero_loss = jnp.zeros((), jnp.float32)
        of_routers = (zero_loss,) * 3 if router is None else router
        metrics = Metrics(*own, *(zero_loss if one is None else one for one in of_routers))
        return eqx.filter(state, eqx.is_array), metrics

    @partial(eqx.filter_jit, donate="all-except-first")
    def compiled(batch: Batch, state: TrainState) -> tuple[TrainState, Metrics]:
        strategy, mesh = state.strategy, state.model.outer.mesh
        if state.zero.stage == 3 and remat == "none":
            raise InputError(
                "ZeRO 3 gathers the weights of a layer again for the backward pass, and remat='none' would keep them; "
                "take 'block' or 'dots'."
            )
        if state.model.chunks > 1 and remat == "none":
            raise InputError(
                "Stages with several chunks take the weights of one of them in each tick, and remat='none' would keep "
                "them; take 'block' or 'dots'.",
                key="remat",
            )
        if (balance_loss or router_z_loss) and state.model.outer.config.routing is None:
            raise InputError(
                "The model has no experts, so balance_loss and router_z_loss have no effect; leave them at 0.",
                key="balance_loss" if balance_loss else "router_z_loss",
            )
        if capacity is not None and state.model.outer.config.routing is None:
            raise InputError("The model has no experts, so capacity has no effect; leave it out.", key="capacity")
        state_specs, batch_spec = state.specs(optimizer), strategy.spec("batch")
        run = partial(on_device, shard_dims=state.shard_dims())
        state = _for_update(state)
        updated, metrics = spmd(run, mesh, (state_specs, batch_spec), (state_specs, PartitionSpec()))(state, batch)
        return eqx.combine(_between_steps(updated), _static(state)), metrics

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        mesh = state.model.outer.mesh
        state.strategy.check_length(batch.inputs.shape[1], mesh)
        stages = state.strategy.parts("layers", mesh)
        if accumulate < stages:
            raise InputError(
                f"With {accumulate} micro-batches, some of {stages} stages always wait; let accumulate be at least "
                f"{stages}.",
                key="accumulate",
            )
        if state.model.chunks > 1 and (schedule == "1f1b" or accumulate % stages):
            raise InputError(
                f"The stages have {state.model.chunks} chunks of layers each, for which the schedule must be 'gpipe' "
                f"and accumulate a multiple of the {stages} stages; or stack the model with chunks=1.",
                key="schedule" if schedule == "1f1b" else "accumulate",
            )
        divisor = accumulate * state.strategy.parts("batch", mesh)
        if batch.inputs.shape[0] % divisor:
            raise InputError(
                f"A batch has {batch.inputs.shape[0]} rows, not a multiple of {divisor}, which is accumulate times the "
                "number of devices that share a batch; change the number of rows."
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
    micro_batches: int,
    label_smoothing: float,
    z_loss: float,
    capacity: float | None,
) -> tuple[Sums, RouterSums | None]:
    model = with_capacity(with_dropout(eqx.combine(weights, constants), key, rows), capacity)
    hidden, routed = model.hidden_and_router_sums(
        batch.inputs, batch.positions, batch.span, wrapped=wrapped, gathering=gathering, micro_batches=micro_batches
    )
    head = model.head(gathering)
    return loss_sums(head, hidden, batch, label_smoothing=label_smoothing, z_loss=z_loss), routed


def _of_stage(
    weights: Stacked,
    received: Passed | None,
    batch: Batch,
    rows: Int[Array, " batch"],
    *,
    constants: Stacked,
    key: PRNGKeyArray,
    gathering: Gathering,
    wrapped: Callable[..., Any],
    label_smoothing: float,
    z_loss: float,
    capacity: float | None,
) -> tuple[Passed, Callable[[], tuple[Sums, RouterSums | None]]]:
    """What this device's blocks pass on, and a function that computes what `_loss` returns.

    Only on the last stage, the loss is not 0 and the sums of routers are complete.
    """
    model = with_capacity(with_dropout(eqx.combine(weights, constants), key, rows), capacity)
    inputs = jnp.asarray(batch.inputs), jnp.asarray(batch.positions), batch.span
    passed = model.stage(received, inputs, wrapped=wrapped, gathering=gathering)

    def found() -> tuple[Sums, RouterSums | None]:
        hidden, routed = model.finished(passed, own_slices(inputs[0], model.strategy, axis=1).shape[1], gathering)
        head = model.head(gathering)
        return loss_sums(head, hidden, batch, label_smoothing=label_smoothing, z_loss=z_loss), routed

    return passed, found


def _weighed(loss: Array, router: RouterLosses | None, *, balance_loss: float, router_z_loss: float) -> Array:
    """The loss with the losses of routers."""
    if router is None or not (balance_loss or router_z_loss):
        return loss
    return loss + (balance_loss * router.balance + router_z_loss * router.z).astype(loss.dtype)


def _gradient(
    loss: Callable[[Stacked, Batch, Int[Array, " batch"]], tuple[Sums, RouterSums | None]],
    weigh: Callable[[Array, RouterLosses | None], Array],
    weights: Stacked,
    batch: Batch,
    strategy: Strategy,
    compute_dtype: DTypeLike | None,
    accumulate: int,
    zero: Zero,
    shard_dims: Stacked,
    in_stages: int,
    of_stage: Callable[..., tuple[Passed, Callable[[], tuple[Sums, RouterSums | None]]]] | None,
) -> tuple[Stacked, Sums, RouterLosses | None]:
    """The gradient of the mean loss over the whole batch, in the precision of the master weights; and the losses.

    Where weights or their updates are sharded, each device gets its shard of the gradient. The batch is accumulated in
    `accumulate` parts, of which each has `in_stages` micro-batches. With `of_stage`, the backward pass of a micro-batch
    begins when its loss is there.
    """
    # Dividing by the total weight makes micro-batches of unequal weight add up to the mean of the batch.
    total = psum(jnp.sum(batch.weights), "batch", strategy)
    tokens = None if weights.outer.config.routing is None else _tokens(batch, strategy)
    # Each device takes the gradient of its own rows; the devices add them up once, in the master weights' precision.
    varying = weights if zero.stage == 3 else zero.vary(weights, shard_dims)
    light = varying if compute_dtype is None else cast_floats(varying, compute_dtype)

    def weighed(
        found: tuple[Sums, RouterSums | None], micro_batch: tuple[Batch, Array]
    ) -> tuple[Float[Array, ""], _Losses]:
        (sums, routed), router = found, None
        if routed is not None and tokens is not None:
            own = _tokens(micro_batch[0], strategy, in_stages).astype(routed.tokens.dtype)
            router = router_losses(routed, own / tokens.astype(own.dtype), strategy)
        return weigh(sums.loss / total.astype(sums.loss.dtype), router), (sums, router)

    def mean(light: Stacked, micro_batch: tuple[Batch, Array]) -> tuple[Float[Array, ""], _Losses]:
        return weighed(loss(light, *micro_batch), micro_batch)

    def added(so_far: tuple[Stacked, _Losses], gradient: Stacked, losses: _Losses) -> tuple[Stacked, _Losses]:
        gradient = jax.tree.map(lambda leaf, weight: leaf.astype(weight.dtype), gradient, weights)
        if zero.stage == 2:
            gradient = zero.scatter(gradient, shard_dims)
        return jax.tree.map(jnp.add, so_far, (gradient, losses))

    def add(so_far: tuple[Stacked, _Losses], micro_batch: tuple[Batch, Array]) -> tuple[tuple[Stacked, _Losses], None]:
        return added(so_far, *jax.grad(mean, has_aux=True)(light, micro_batch)), None

    def backward(
        so_far: tuple[Stacked, _Losses],
        received: Passed,
        micro_batch: tuple[Batch, Array],
        gradient: Passed,
        exists: Array,
    ) -> tuple[tuple[Stacked, _Losses], Passed]:
        def run(light: Stacked, received: Passed) -> tuple[tuple[Passed, Array], _Losses]:
            passed, found = cast(Any, of_stage)(light, received, *micro_batch)
            loss, losses = weighed(found(), micro_batch)
            return (passed, loss), losses

        (_, loss), pull, losses = jax.vjp(run, light, received, has_aux=True)
        of_light, of_received = pull((gradient, *vary_alike(exists.astype(loss.dtype), loss)[:1]))
        losses = jax.tree.map(lambda sum: jnp.where(exists, sum, 0), losses)
        return added(so_far, of_light, losses), of_received

    count = batch.inputs.shape[0]
    rows = shard_index("batch", strategy)[0] * count + jnp.arange(count, dtype=jnp.int32)
    micro_batches = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), (batch, rows))
    first = jax.tree.map(lambda leaf: leaf[0], micro_batches)
    shapes = jax.eval_shape(mean, light, first)[1]
    # Stage 2 accumulates shards of the gradient from the first micro-batch on.
    like = zero.own_shards(weights, shard_dims) if zero.stage == 2 else varying
    own = of_last_stage(own_slices(jnp.asarray(batch.weights), strategy, axis=1), strategy)
    start = (
        jax.tree.map(lambda leaf: vary_alike(jnp.zeros_like(leaf), leaf)[0], like),
        jax.tree.map(lambda sum: vary_alike(jnp.zeros(sum.shape, sum.dtype), own)[0], shapes),
    )
    if of_stage is None:
        (gradient, losses), _ = lax.scan(add, start, micro_batches)
    else:
        forward = partial(of_stage, light)
        gradient, losses = one_forward_one_backward(
            lambda received, micro_batch: forward(received, *micro_batch)[0], backward, start, micro_batches, strategy
        )
    if zero.stage < 2:
        gradient = zero.sum(gradient, shard_dims)
    if zero.stage == 1:
        gradient = zero.own_shards(gradient, shard_dims)
    return gradient, *jax.tree.map(lambda sum: psum(sum, "batch seq layers", strategy), losses)


def _tokens(batch: Batch, strategy: Strategy, parts: int = 1) -> Float[Array, " parts"]:
    """The tokens without padding in each part of all devices' rows, or 1 if there are none."""
    counted = (batch.positions >= 0).astype(jnp.float32).reshape(parts, -1)
    return jnp.maximum(psum(jnp.sum(counted, axis=1), "batch", strategy), 1)


def _for_update(state: TrainState) -> TrainState:
    """The state with the optimizer state on the device. Transfers move whole arrays: call it outside `shard_map`."""
    return eqx.tree_at(_optimizer_state, state, replace_fn=to_device) if state.offload else state


def _between_steps(state: TrainState) -> TrainState:
    """The state with the optimizer state where it is kept until the next step."""
    return eqx.tree_at(_optimizer_state, state, replace_fn=to_host) if state.offload else state


def _optimizer_state(state: TrainState) -> PyTree:
    return state.optimizer_state


def _static(tree: PyTree) -> PyTree:
    """The leaves that are neither arrays nor shapes of arrays."""
    return jax.tree.map(
        lambda leaf: None if eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) else leaf, tree
    )
