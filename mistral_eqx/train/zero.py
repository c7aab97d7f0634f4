"""Training state that is split over the devices which share a batch ([ZeRO](https://arxiv.org/abs/1910.02054))."""

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
from ..parallel import Strategy, gather_parts, own_part, scatter_sum, vary
from .trained import is_array, trained


@dataclasses.dataclass(frozen=True)
class Zero:
    """How much of the state is split over the devices that share a batch.

    | stage | split are | and exchanged in a step are |
    |---|---|---|
    | 0 | nothing | the sum of the gradients, to all |
    | 1 | the optimizer's state | that, and the new weights |
    | 2 | gradients too | to each its part of the gradients' sum, and the new weights |
    | 3 | weights too | weights, layer by layer, forward and backward, and to each its part of the gradients' sum |

    Each array is cut along its first dimension that can be, `layers` apart; one that has none stays whole. Arrays keep
    their names and global shapes: only where their entries are differs from stage to stage.

    **Attributes:**

    - `stage`: from 0 to 3.
    - `axes`: the axes of the mesh over which the batch is split.
    - `devices`: how many devices these are.
    """

    stage: int = 0
    axes: tuple[str, ...] = ()
    devices: int = 1

    @classmethod
    def init(cls, stage: int, mesh: Mesh | AbstractMesh | None, strategy: Strategy) -> "Zero":
        """Checks the stage.

        **Raises:** `ValueError` if there is no such stage, or nothing to split over.
        """
        if stage not in (0, 1, 2, 3):
            raise InputError(f"There is no ZeRO stage {stage}; take 0, 1, 2 or 3.")
        axes = strategy.axes("batch")
        if stage and (mesh is None or not axes):
            raise InputError(
                f"ZeRO {stage} splits state over devices that share a batch, and the strategy {strategy.layout!r} does "
                "not split 'batch'; add ' batch@dp' to it, and the axis dp to the mesh."
            )
        return cls(stage, axes, strategy.parts("batch", mesh))

    def cuts(self, model: Stacked, place: Stacked, mesh: Mesh | None) -> Stacked:
        """Along which dimension each array is cut on one device; -1 for those that stay whole.

        **Arguments:**

        - `model`: with global shapes.
        - `place`: how its arrays lie on the mesh before they are cut.
        """

        def cut(leaf: Array | jax.ShapeDtypeStruct, spec: PartitionSpec, parted: bool, first: int) -> int:
            if mesh is None or not self.stage or not parted:
                return -1
            local = NamedSharding(mesh, spec).shard_shape(leaf.shape)
            return next((at for at in range(first, len(local)) if local[at] % self.devices == 0), -1)

        arrays = eqx.filter(model, is_array)
        # Weights that are not trained have no gradient and no state, but are as large.
        parted = jax.tree.map(is_array, model) if self.stage == 3 else trained(model)
        parted = jax.tree.map(lambda leaf, part: part if is_array(leaf) else None, model, parted)
        outer = jax.tree.map(partial(cut, first=0), arrays.outer, place.outer, parted.outer)
        return Stacked(outer, jax.tree.map(partial(cut, first=1), arrays.pattern, place.pattern, parted.pattern))

    def specs(self, place: PyTree[PartitionSpec], cuts: PyTree[int]) -> PyTree[PartitionSpec]:
        """How the parts lie on the mesh."""

        def spec(whole: PartitionSpec, cut: int) -> PartitionSpec:
            if cut < 0:
                return whole
            dims = [*whole, *(None,) * (cut + 1 - len(whole))]
            others = dims[cut] or ()
            dims[cut] = (*((others,) if isinstance(others, str) else others), *self.axes)
            return PartitionSpec(*dims)

        return jax.tree.map(spec, place, cuts)

    def own(self, whole: PyTree[Array], cuts: PyTree[int]) -> PyTree[Array]:
        """This device's parts of what all have."""
        return jax.tree.map(lambda leaf, cut: leaf if cut < 0 else own_part(leaf, self.axes, axis=cut), whole, cuts)

    def scatter(self, partial: PyTree[Array], cuts: PyTree[int]) -> PyTree[Array]:
        """This device's parts of the sum of what the devices have."""
        return jax.tree.map(lambda leaf, cut: scatter_sum(leaf, self.axes, axis=cut), partial, cuts)

    def gather(self, parts: PyTree[Array], cuts: PyTree[int], *, to: str) -> PyTree[Array]:
        """The whole, from the parts of all devices.

        **Arguments:**

        - `to`: `"invarying"` if all devices are to know that they have the same; `"varying"` if each has a gradient of
            its own, that of its rows, of which each is then to receive its part of the sum.
        """
        return jax.tree.map(
            lambda leaf, cut: leaf if cut < 0 else gather_parts(leaf, self.axes, axis=cut, to=to), parts, cuts
        )

    def vary(self, whole: PyTree[Array]) -> PyTree[Array]:
        """The same, of which each device takes its own gradient."""
        return jax.tree.map(lambda leaf: vary(leaf, self.axes), whole) if self.axes else whole

    def sum(self, partial: PyTree[Array]) -> PyTree[Array]:
        """The sum of what the devices have."""
        return jax.tree.map(lambda leaf: scatter_sum(leaf, self.axes, axis=-1), partial) if self.axes else partial

    def gathering(self, cuts: Stacked) -> Gathering:
        """How a model of which each device has a part is put together, in the forward and in the backward pass."""
        if self.stage < 3:
            return AS_IT_IS
        inside = jax.tree.map(lambda cut: max(cut - 1, -1), cuts.pattern)

        def gathered(parts: PyTree, cuts: PyTree[int]) -> PyTree:
            # Keys for dropout are no part of the state.
            keys, parts = eqx.partition(parts, _is_key)
            return eqx.combine(keys, self.gather(parts, cuts, to="varying"))

        return Gathering(partial(gathered, cuts=cuts.outer), partial(gathered, cuts=inside))


def _is_key(leaf: PyTree) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
