"""Training state sharded over the data-parallel devices ([ZeRO](https://arxiv.org/abs/1910.02054))."""

import dataclasses
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
class Zero:
    """How much of the state is sharded over the devices that share a batch.

    | stage | sharded | exchanged in a step |
    |---|---|---|
    | 0 | nothing | all-reduce of the gradients |
    | 1 | the optimizer state | all-reduce of the gradients, all-gather of the new weights |
    | 2 | gradients too | reduce-scatter of the gradients, all-gather of the new weights |
    | 3 | weights too | all-gather of the weights of each layer, forward and backward; reduce-scatter of the gradients |

    Each array is sharded along its first dimension, other than `layers`, that the devices divide. An array without such
    a dimension stays whole. Names and global shapes are the same in every stage: only the shardings differ.

    **Attributes:**

    - `stage`: from 0 to 3.
    - `axes`: the mesh axes over which the batch is split.
    - `devices`: the number of devices along these axes.
    """

    stage: int = 0
    axes: tuple[str, ...] = ()
    devices: int = 1

    @classmethod
    def init(cls, stage: int, mesh: Mesh | AbstractMesh | None, strategy: Strategy) -> "Zero":
        """Checks a stage against a strategy and its mesh.

        **Raises:** `ValueError` if there is no such stage, or the strategy does not split the batch.
        """
        if stage not in (0, 1, 2, 3):
            raise InputError(f"There is no ZeRO stage {stage}; take 0, 1, 2 or 3.")
        axes = strategy.axes("batch")
        if stage and (mesh is None or not axes):
            raise InputError(
                f"ZeRO {stage} shards the state over devices that share a batch, and the strategy {strategy.layout!r} "
                "does not split 'batch'; add ' batch@dp' to the strategy and the axis dp to the mesh."
            )
        return cls(stage, axes, strategy.parts("batch", mesh))

    def shard_dims(self, model: Stacked, specs: Stacked, mesh: Mesh | None) -> Stacked:
        """The index of the dimension along which each array is sharded; -1 for an array that stays whole.

        **Arguments:**

        - `model`: the model with global shapes.
        - `specs`: the PartitionSpecs of its arrays without ZeRO.
        """

        def shard_dim(leaf: Array | jax.ShapeDtypeStruct, spec: PartitionSpec, sharded: bool, first: int) -> int:
            if mesh is None or not self.stage or not sharded:
                return -1
            local = NamedSharding(mesh, spec).shard_shape(leaf.shape)
            return next((dim for dim in range(first, len(local)) if local[dim] % self.devices == 0), -1)

        arrays = eqx.filter(model, is_array)
        # Stage 3 also shards weights that are not trained: they have no optimizer state, but take as much memory.
        sharded = jax.tree.map(is_array, model) if self.stage == 3 else trained(model)
        sharded = jax.tree.map(lambda leaf, flag: flag if is_array(leaf) else None, model, sharded)
        outer = jax.tree.map(partial(shard_dim, first=0), arrays.outer, specs.outer, sharded.outer)
        return Stacked(outer, jax.tree.map(partial(shard_dim, first=1), arrays.pattern, specs.pattern, sharded.pattern))

    def specs(self, specs: PyTree[PartitionSpec], shard_dims: PyTree[int]) -> PyTree[PartitionSpec]:
        """The PartitionSpecs of the shards, from those without ZeRO."""

        def spec(whole: PartitionSpec, dim: int) -> PartitionSpec:
            if dim < 0:
                return whole
            dims = [*whole, *(None,) * (dim + 1 - len(whole))]
            others = dims[dim] or ()
            dims[dim] = (*((others,) if isinstance(others, str) else others), *self.axes)
            return PartitionSpec(*dims)

        return jax.tree.map(spec, specs, shard_dims)

    def own_shards(self, whole: PyTree[Array], shard_dims: PyTree[int]) -> PyTree[Array]:
        """This device's shards of arrays that all devices have; nothing is exchanged."""
        return jax.tree.map(
            lambda leaf, dim: leaf if dim < 0 else own_shard(leaf, self.axes, axis=dim), whole, shard_dims
        )

    def scatter(self, partial: PyTree[Array], shard_dims: PyTree[int]) -> PyTree[Array]:
        """This device's shards of the sum over devices (reduce-scatter)."""
        return jax.tree.map(lambda leaf, dim: scatter_sum(leaf, self.axes, axis=dim), partial, shard_dims)

    def gather(self, shards: PyTree[Array], shard_dims: PyTree[int], *, to: str) -> PyTree[Array]:
        """Whole arrays from the shards of all devices (all-gather).

        **Arguments:**

        - `to`: `"invarying"` marks the result as the same on all devices. With `"varying"` each device has its own
            gradient, that of its rows, and the backward pass reduce-scatters these gradients.
        """
        return jax.tree.map(
            lambda leaf, dim: leaf if dim < 0 else gather_shards(leaf, self.axes, axis=dim, to=to), shards, shard_dims
        )

    def vary(self, whole: PyTree[Array]) -> PyTree[Array]:
        """The same arrays, marked so that each device takes its own gradient of them."""
        return jax.tree.map(lambda leaf: vary(leaf, self.axes), whole) if self.axes else whole

    def sum(self, partial: PyTree[Array]) -> PyTree[Array]:
        """The sum over devices (all-reduce)."""
        return jax.tree.map(lambda leaf: scatter_sum(leaf, self.axes, axis=-1), partial) if self.axes else partial

    def gathering(self, shard_dims: Stacked) -> Gathering:
        """How the forward and the backward pass gather a model of which each device has shards."""
        if self.stage < 3:
            return AS_IT_IS
        # The scan over repeats removes the leading dimension `layers`.
        in_scan = jax.tree.map(lambda dim: max(dim - 1, -1), shard_dims.pattern)

        def gathered(shards: PyTree, shard_dims: PyTree[int]) -> PyTree:
            # Dropout keys are not part of the state, and are never sharded.
            keys, shards = eqx.partition(shards, _is_key)
            return eqx.combine(keys, self.gather(shards, shard_dims, to="varying"))

        return Gathering(partial(gathered, shard_dims=shard_dims.outer), partial(gathered, shard_dims=in_scan))


def _is_key(leaf: PyTree) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
