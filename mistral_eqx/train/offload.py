"""Optimizer state in host memory; a step moves it to the device for the update."""

from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from ..errors import InputError


HOST = "pinned_host"


def check_host(mesh: Mesh | None):
    """Checks that the devices can access host memory.

    **Raises:** `ValueError` if they cannot.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise InputError(
            f"Devices of the platform {device.platform!r} have no memory {HOST!r} for the optimizer state; leave out "
            "offload=True."
        )


def is_offloaded(leaf: Any) -> bool:
    """Whether a leaf of the optimizer state is kept in host memory: arrays are, scalars such as a count are not."""
    return (eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)) and leaf.ndim > 0


def to_host(optimizer_state: PyTree) -> PyTree:
    """Moves the arrays to host memory with the same sharding; call it inside `jax.jit`."""
    return _moved(optimizer_state, jax.memory.Space.Host)


def to_device(optimizer_state: PyTree) -> PyTree:
    """Moves the arrays to device memory with the same sharding; call it inside `jax.jit`."""
    return _moved(optimizer_state, jax.memory.Space.Device)


def _moved(tree: PyTree, space: Any) -> PyTree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if is_offloaded(leaf) else leaf, tree)
