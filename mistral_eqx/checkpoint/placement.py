"""Which parts of a tensor this process's devices hold, and how they get there."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ..parallel import SINGLE, Strategy


Index = tuple[slice, ...]
"""A part of a tensor: a slice for each of its axes."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the tensors of a model go.

    **Attributes:**

    - `mesh`: the devices, of this process and maybe of others; `None` for the default device.
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
        """The mesh as text that is the same on all processes: its axes, and its devices in order."""
        if self.mesh is None:
            return "the default device"
        return f"{dict(self.mesh.shape)} {[device.id for device in self.mesh.devices.flat]}"

    def parts(self, dims: str, shape: tuple[int, ...]) -> list[Index]:
        """The parts of a tensor that this process's devices hold; one that several of them hold comes once."""
        sharding = self._sharding(dims)
        if sharding is None:
            return [(slice(None),) * len(shape)]
        indices = sharding.addressable_devices_indices_map(shape).values()
        return list({_bounds(index, shape): index for index in indices if index is not None}.values())

    def entries(self, dims: str, shape: tuple[int, ...]) -> int:
        """How many entries these parts have together."""
        return sum(
            math.prod(len(range(*bounds)) for bounds in _bounds(part, shape)) for part in self.parts(dims, shape)
        )

    def put(
        self,
        dims: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        read: Callable[[Sequence[Index]], Sequence[np.ndarray]],
    ) -> jax.Array:
        """Makes the array, and waits until it is on its devices.

        **Arguments:**

        - `dims`, `shape`, `dtype`: of the tensor.
        - `read`: gives this process's parts of it. What several devices hold is read once.
        """
        parts = self.parts(dims, shape)
        arrays = read(parts)
        sharding = self._sharding(dims)
        if sharding is None:
            return jax.block_until_ready(jax.device_put(arrays[0]))
        known = {_bounds(part, shape): array for part, array in zip(parts, arrays, strict=True)}

        def of(index: Index | None) -> np.ndarray:
            return known[_bounds((slice(None),) * len(shape) if index is None else index, shape)]

        return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, of, dtype=dtype))

    def _sharding(self, dims: str) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, self.strategy.spec(dims))


def _bounds(index: Index, shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple(part.indices(size) for part, size in zip(index, shape, strict=True))


ON_DEFAULT_DEVICE = Placement()
