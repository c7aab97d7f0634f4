"""The shards of a tensor on this process's devices, and their transfer to the devices."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..parallel import SINGLE, Strategy


Index = tuple[slice, ...]
"""The position of a shard in its tensor: a slice for each axis."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices and the sharding of a model's tensors.

    **Attributes:**

    - `mesh`: the devices, of one process or of several; `None` for the default device.
    - `strategy`: which dimensions are split over which axes of the mesh.
    """

    mesh: Mesh | None = None
    strategy: Strategy = SINGLE

    @property
    def several_processes(self) -> bool:
        """Whether other processes have devices of the mesh."""
        return self.mesh is not None and self.mesh.is_multi_process

    @property
    def devices(self) -> str:
        """The mesh as text, for the check that processes agree: its axes, and its devices in order."""
        if self.mesh is None:
            return "the default device"
        return f"{dict(self.mesh.shape)} {[device.id for device in self.mesh.devices.flat]}"

    @property
    def platform(self) -> str:
        """The kind of the devices: `"cpu"`, `"gpu"` or `"tpu"`."""
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        return device.platform

    def shards(self, dims: str, shape: tuple[int, ...]) -> list[Index]:
        """The shards of a tensor on this process's devices. Replicas of a shard are listed once."""
        sharding = self._sharding(dims)
        if sharding is None:
            return [(slice(None),) * len(shape)]
        indices = sharding.addressable_devices_indices_map(shape).values()
        return list({_bounds(index, shape): index for index in indices if index is not None}.values())

    def entries(self, dims: str, shape: tuple[int, ...]) -> int:
        """The number of entries of these shards together."""
        return sum(
            math.prod(len(range(*bounds)) for bounds in _bounds(shard, shape)) for shard in self.shards(dims, shape)
        )

    def put(
        self,
        dims: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        read: Callable[[Sequence[Index]], Sequence[np.ndarray]],
    ) -> jax.Array:
        """Makes a sharded array, and waits until it is on its devices.

        **Arguments:**

        - `dims`, `shape`, `dtype`: of the tensor.
        - `read`: reads this process's shards. Replicas of a shard are read once.
        """
        shards = self.shards(dims, shape)
        arrays = read(shards)
        sharding = self._sharding(dims)
        if sharding is None:
            return jax.block_until_ready(jax.device_put(arrays[0]))
        known = {_bounds(shard, shape): array for shard, array in zip(shards, arrays, strict=True)}

        def shard_at(index: Index | None) -> np.ndarray:
            return known[_bounds((slice(None),) * len(shape) if index is None else index, shape)]

        return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, shard_at, dtype=dtype))

    def _sharding(self, dims: str) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, self.strategy.spec(dims))


def _bounds(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple(axis.indices(size) for axis, size in zip(index, shape, strict=True))


ON_DEFAULT_DEVICE = Placement()
