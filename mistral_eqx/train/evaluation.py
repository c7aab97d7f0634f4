"""The loss of a model on a batch, without a gradient."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from ..nn import Gathering, Stacked
from ..parallel import Strategy, psum, spmd
from .batch import Batch
from .loss import Sums, loss_sums
from .step import TrainState
from .trained import cast_floats, trained


Evaluation = Callable[[TrainState, Batch], Sums]


def make_evaluation(*, compute_dtype: DTypeLike | None = jnp.bfloat16) -> Evaluation:
    """A function that measures the loss of a batch: `sums = evaluation(state, batch)`.

    The loss is the cross-entropy alone, without label smoothing or z-loss.

    **Arguments:**

    - `compute_dtype`: as for [`mistral_eqx.train.make_step`][].

    **Returns:** the function. For a mean over several batches, add up their sums and divide once by the weight.
    """

    def on_device(model: Stacked, batch: Batch, *, gathering: Gathering, strategy: Strategy) -> Sums:
        weights, constants = eqx.partition(model, trained(model))
        if compute_dtype is not None:
            weights = cast_floats(weights, compute_dtype)
        model = eqx.combine(weights, constants)
        hidden = model.hidden(batch.inputs, batch.positions, batch.span, gathering=gathering)
        sums = loss_sums(model.head(gathering), hidden, batch)
        return jax.tree.map(lambda sum: psum(sum, "batch seq layers", strategy), sums)

    @eqx.filter_jit
    def evaluation(state: TrainState, batch: Batch) -> Sums:
        run = partial(on_device, gathering=state.zero.gathering(state.shard_dims()), strategy=state.strategy)
        in_specs = state.model_specs(), state.strategy.spec("batch")
        return spmd(run, state.model.outer.mesh, in_specs, PartitionSpec())(state.model, batch)

    def checked(state: TrainState, batch: Batch) -> Sums:
        state.strategy.check_length(batch.inputs.shape[1], state.model.outer.mesh)
        return evaluation(state, jax.tree.map(jnp.asarray, batch))

    return checked
