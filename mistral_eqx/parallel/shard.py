"""Placing arrays and whole models on a mesh."""

import dataclasses
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from ..checks import checked
from ..documents import shown
from ..errors import InputError
from .agreement import agree
from .spmd import specs
from .strategy import Strategy


# A module with a config and a mesh, which are known only above this room.
Model = TypeVar("Model", bound=Any)


def shard(model: Model, mesh: Mesh, strategy: Strategy) -> Model:
    """Splits a model over the devices of a mesh.

    ```python
    mesh = mx.make_mesh("tp=8")
    model = mx.shard(model, mesh, mx.HEADS)
    logits = eqx.filter_jit(model)(ids)  # the same call as before
    ```

    A model that is too large for one device is better loaded in parts, with `mx.load(path, mesh=mesh, strategy=...)`.

    **Arguments:**

    - `model`: a model on one device, or split another way.
    - `mesh`: the devices.
    - `strategy`: which dimensions are split over which axes of the mesh.

    **Returns:** the model, each of its arrays cut as the strategy says and with one part on each device. Nothing is
    permuted, padded or cast.

    **Raises:** `ValueError` if the strategy does not fit the model or the mesh, as `Strategy.check` says.
    """
    checked(strategy, Strategy, "strategy", remedy="such as mistral_eqx.HEADS or mistral_eqx.Strategy('hidden@tp')")
    strategy.check(model, mesh)
    agree("strategy", strategy.layout)
    mesh = by_hand(mesh)
    arrays, static = eqx.partition(with_strategy(model, strategy), eqx.is_array)
    placed = jax.tree.map(lambda x, spec: place_on(x, mesh, spec), arrays, specs(arrays, strategy))
    return dataclasses.replace(eqx.combine(placed, static), mesh=mesh)


def with_strategy(model: PyTree, strategy: Strategy) -> PyTree:
    """The same module with another strategy in each layer."""
    return jax.tree.map(
        lambda leaf: strategy if isinstance(leaf, Strategy) else leaf,
        model,
        is_leaf=lambda leaf: isinstance(leaf, Strategy),
    )


def by_hand(mesh: Mesh) -> Mesh:
    """The same mesh with axes of type `Auto`.

    What is exchanged over them is written out in `shard_map`; arrays may enter it split in any way.
    """
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def place_on(x: Array | np.ndarray, mesh: Mesh, spec: PartitionSpec) -> Array:
    """Puts an array on a mesh, in parts, from this process or from all of them.

    **Arguments:**

    - `x`: an array that each process has, the same on all, or one that is split over the same devices already.
    - `mesh`, `spec`: where its parts go.
    """
    sharding = NamedSharding(mesh, spec)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # Each process hands over the parts of its own devices.
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def everywhere(x: Array) -> np.ndarray:
    """All of an array, on every process, however it is split."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def einshard(x: Array | np.ndarray, expression: str, mesh: Mesh) -> Array:
    """Splits any array by an expression in the manner of einsum.

    ```python
    mx.einshard(x, "batch@dp seq embed@tp", mesh)
    mx.einshard(x, "... embed@tp", mesh)
    ```

    The mesh is given, not made: arrays of one mesh can meet in a collective.

    **Arguments:**

    - `x`: an array or a numpy array. On several processes each has all of it, and its devices receive their parts.
    - `expression`: one word a dimension, in order: a name, with `@axis` or `@axis,axis` where it is split. `...`
        stands for any number of dimensions that are not.
    - `mesh`: the devices.

    **Returns:** the array on the mesh. Along axes that the expression does not name it is replicated.

    **Raises:** `ValueError` if the expression does not fit the array or the mesh.
    """
    if not isinstance(x, jax.Array | np.ndarray):
        raise InputError(f"einshard splits an array, not {shown(x)}; give one, as numpy.asarray makes.", key="x")
    checked(mesh, Mesh, "mesh", remedy="mistral_eqx.make_mesh makes one")
    words = checked(expression, str, "expression", remedy="it reads 'batch@dp seq embed@tp'").split()
    if words.count("...") > 1:
        raise InputError(f"The expression {expression!r} has more than one '...'; keep one.")
    if "..." in words:
        at = words.index("...")
        words[at : at + 1] = ["."] * (x.ndim - len(words) + 1)
    if len(words) != x.ndim:
        raise InputError(
            f"The expression {expression!r} is for another number of dimensions than the array's {x.ndim}, "
            f"which has shape {x.shape}; give one word a dimension, or '...' for those that are not split."
        )
    names = [word.split("@")[0] for word in words]
    if twice := {name for name in names if names.count(name) > 1} - {"."}:
        raise InputError(f"The expression {expression!r} has two dimensions {min(twice)!r}; give each its own name.")
    layout = Strategy(" ".join(word for word in words if "@" in word))
    taken: set[str] = set()
    for name, size in zip(names, x.shape, strict=True):
        for axis in layout.axes(name):
            if axis not in mesh.shape:
                raise InputError(
                    f"The expression {expression!r} splits {name!r} over the mesh axis {axis!r}, which the mesh lacks: "
                    f"it has {', '.join(map(repr, mesh.shape))}."
                )
            if axis in taken:
                raise InputError(f"The expression {expression!r} uses the mesh axis {axis!r} for two dimensions.")
            taken.add(axis)
        if size % (devices := layout.parts(name, mesh)):
            raise InputError(f"{size} {name} cannot be split over {devices} devices; change the mesh or the array.")
    agree("expression", expression)
    return place_on(x, mesh, layout.spec(" ".join(names)))
