"""Training state sharded over the data-parallel devices ([ZeRO](https://arxiv.org/abs/1910.02054))."""

import dataclasses
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ..errors import InputError
from ..nn import Gathering, Stacked
from ..nn.stack import AS_IT_IS
from ..parallel import Strategy, gather_shards, own_shard, scatter_sum, vary
from .trained import is_array, trained


@dataclasses.dataclass(frozen=True)
class Shard:
    """How ZeRO shards one array.

    **Attributes:**

    - `dim`: the index of the dimension along which it is sharded; -1 for an array that stays whole.
    - `axes`: the mesh axes over which the batch is split and the array is not. Its gradient is summed over them: along
        another axis of the batch, each device has other entries, such as other experts.
    """

    dim: int
    axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Zero:
    """How much of the state is sharded over the devices that share a batch.

    | stage | sharded | exchanged in a step |
    |---|---|---|
    | 0 | nothing | all-reduce of the gradients |
    | 1 | the optimizer state | all-reduce of the gradients, all-gather of the new weights |
    | 2 | gradients too | reduce-scatter of the gradients, all-gather of the new weights |
    | 3 | weights too | all-gather of the weights of each layer, forward and backward; reduce-scatter of the gradients |

    Each array is sharded along its first dimension, other than `layers`, that the devices divide. An array without such
    a dimension stays whole, and so do experts that the strategy splits over the same mesh axes as the batch: each
    device has and updates its own. Names and global shapes are the same in every stage: only the shardings differ.

    **Attributes:**

    - `stage`: from 0 to 3.
    - `axes`: the mesh axes over which the batch is split, by rows and by tokens; and those that split the layers, along
        which the table, the last norm and the head are copies.
    """

    stage: int = 0
    axes: tuple[str, ...] = ()

    @classmethod
    def init(cls, stage: int, mesh: Mesh | AbstractMesh | None, strategy: Strategy) -> "Zero":
        """Checks a stage against a strategy and its mesh.

        **Raises:** `ValueError` if there is no such stage, or the strategy does not split the batch.
        """
        if stage not in (0, 1, 2, 3):
            raise InputError(f"There is no ZeRO stage {stage}; take 0, 1, 2 or 3.")
        axes = strategy.axes("batch seq layers")
        if stage and (mesh is None or not axes):
            raise InputError(
                f"ZeRO {stage} shards the state over devices that share a batch, and the strategy {strategy.layout!r} "
                "does not split 'batch'; add ' batch@dp' to the strategy and the axis dp to the mesh."
            )
        return cls(stage, axes)

    def shard_dims(self, model: Stacked, specs: Stacked, mesh: Mesh | None) -> Stacked:
        """How each array is sharded.

        **Arguments:**

        - `model`: the model with global shapes.
        - `specs`: the PartitionSpecs of its arrays without ZeRO.
        """

        def shard_dim(leaf: Array | jax.ShapeDtypeStruct, spec: PartitionSpec, sharded: bool, first: int) -> Shard:
            split = {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
            axes = tuple(axis for axis in self.axes if axis not in split)
            if mesh is None or not self.stage or not sharded or not axes:
                return Shard(-1, axes)
            local = NamedSharding(mesh, spec).shard_shape(leaf.shape)
            devices = math.prod(mesh.shape[axis] for axis in axes)
            return Shard(next((dim for dim in range(first, len(local)) if local[dim] % devices == 0), -1), axes)

        arrays = eqx.filter(model, is_array)
        # Stage 3 also shards weights that are not trained: they have no optimizer state, but take as much memory.
        sharded = jax.tree.map(is_array, model) if self.stage == 3 else trained(model)
        sharded = jax.tree.map(lambda leaf, flag: flag if is_array(leaf) else None, model, sharded)
        outer = jax.tree.map(partial(shard_dim, first=0), arrays.outer, specs.outer, sharded.outer)
        pattern = jax.tree.map(partial(shard_dim, first=1), arrays.pattern, specs.pattern, sharded.pattern)
        return Stacked(outer, pattern, model.chunks)

    def specs(self, specs: PyTree[PartitionSpec], shard_dims: PyTree[Shard]) -> PyTree[PartitionSpec]:
        """The PartitionSpecs of the shards, from those without ZeRO."""

        def spec(whole: PartitionSpec, shard: Shard) -> PartitionSpec:
            if shard.dim < 0:
                return whole
            dims = [*whole, *(None,) * (shard.dim + 1 - len(whole))]
            others = dims[shard.dim] or ()
            dims[shard.dim] = (*((others,) if isinstance(others, str) else others), *shard.axes)
            return PartitionSpec(*dims)

        return jax.tree.map(spec, specs, shard_dims)

    def own_shards(self, whole: PyTree[Array], shard_dims: PyTree[Shard]) -> PyTree[Array]:
        """This device's shards of arrays that all devices have; nothing is exchanged."""
        return jax.tree.map(
            lambda leaf, shard: leaf if shard.dim < 0 else own_shard(leaf, shard.axes, axis=shard.dim),
            whole,
            shard_dims,
        )

    def scatter(self, partial: PyTree[Array], shard_dims: PyTree[Shard]) -> PyTree[Array]:
        """This device's shards of the sum over devices (reduce-scatter)."""
        return jax.tree.map(
            lambda leaf, shard: scatter_sum(leaf, shard.axes, axis=shard.dim) if shard.axes else leaf,
            partial,
            shard_dims,
        )

    def gather(self, shards: PyTree[Array], shard_dims: PyTree[Shard], *, to: str) -> PyTree[Array]:
        """Whole arrays from the shards of all devices (all-gather).

        **Arguments:**

        - `to`: `"invarying"` marks the result as the same on all devices. With `"varying"` each device has its own
            gradient, that of its rows, and the backward pass reduce-scatters these gradients.
        """
        return jax.tree.map(
            lambda leaf, shard: leaf if shard.dim < 0 else gather_shards(leaf, shard.axes, axis=shard.dim, to=to),
            shards,
            shard_dims,
        )

    def vary(self, whole: PyTree[Array], shard_dims: PyTree[Shard]) -> PyTree[Array]:
        """The same arrays, marked so that each device takes its own gradient of them."""
        return jax.tree.map(lambda leaf, shard: vary(leaf, shard.axes) if shard.axes else leaf, whole, shard_dims)

    def sum(self, partial: PyTree[Array], shard_dims: PyTree[Shard]) -> PyTree[Array]:
        """The sum over devices (all-reduce)."""
        return jax.tree.map(
            lambda leaf, shard: scatter_sum(leaf, shard.axes, axis=-1) if shard.axes else leaf, partial, shard_dims
        )

    def gathering(self, shard_dims: Stacked) -> Gathering:
        """How the forward and the backward pass gather a model of which each device has shards."""
        if self.stage < 3:
            return AS_IT_IS
        # The scan over repeats removes the leading dimension `layers`.
        in_scan = jax.tree.map(
            # All chunks have the same shapes.
            lambda shard: dataclasses.replace(shard, dim=max(shard.dim - 1, -1)),
            shard_dims.chunk(0),
        )

        def gathered(shards: PyTree, shard_dims: PyTree[Shard]) -> PyTree:
            # Dropout keys are not part of the state, and are never sharded.
            keys, shards = eqx.partition(shards, _is_key)
            return eqx.combine(keys, self.gather(shards, shard_dims, to="varying"))

        return Gathering(partial(gathered, shard_dims=shard_dims.outer), partial(gathered, shard_dims=in_scan))


def _is_key(leaf: PyTree) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
