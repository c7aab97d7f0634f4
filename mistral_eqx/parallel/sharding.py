"""Arrays and whole models on a mesh."""

from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
from jaxtyping import Array, PyTree

from ..checks import checked
from ..documents import shown
from ..errors import InputError
from .agreement import check_same
from .spmd import dims_of, specs
from .strategy import Strategy


# A module with the attributes `config` and `mesh` and the method `on_mesh`; its class is in a room above this one.
Model = TypeVar("Model", bound=Any)


def shard(model: Model, mesh: Mesh, strategy: Strategy) -> Model:
    """Splits a model over the devices of a mesh.

    ```python
    mesh = mx.make_mesh("tp=8")
    model = mx.shard(model, mesh, mx.HEADS)
    logits = eqx.filter_jit(model)(ids)  # the same call as before
    ```

    A model that is too large for one device can be loaded in shards, with `mx.load(path, mesh=mesh, strategy=...)`.

    **Arguments:**

    - `model`: a model on one device, or split another way.
    - `mesh`: the devices.
    - `strategy`: which dimensions are split over which axes of the mesh.

    **Returns:** the model, each array split as the strategy says, with one shard on each device. No array is permuted,
    padded or cast.

    **Raises:** `ValueError` if the strategy does not fit the model or the mesh, as `Strategy.check` says.
    """
    checked(strategy, Strategy, "strategy", remedy="such as mistral_eqx.HEADS or mistral_eqx.Strategy('hidden@tp')")
    strategy.check(model, mesh)
    check_same("strategy", strategy.layout)
    mesh = with_auto_axes(mesh)
    arrays, static = eqx.partition(with_strategy(model, strategy), eqx.is_array)
    check_shapes(arrays, mesh, strategy)
    placed = jax.tree.map(lambda x, spec: put_on_mesh(x, mesh, spec), arrays, specs(arrays, strategy))
    return eqx.combine(placed, static).on_mesh(mesh)


def check_shapes(arrays: PyTree, mesh: Mesh | AbstractMesh, strategy: Strategy):
    """Checks that the devices divide each array that they split, as `Strategy.check_shape` says.

    **Arguments:**

    - `arrays`: a model with its arrays, or their shapes, and nothing else.
    - `mesh`, `strategy`: the devices, and which dimensions are split over which axes.

    **Raises:** `ValueError` that names the layer, or if the strategy splits `layers` and the blocks are not stacked.
    """
    stacked = False
    for path, array in jax.tree_util.tree_leaves_with_path(arrays):
        layer = jax.tree_util.keystr(path[:-1], simple=True, separator=".").removesuffix(".weight")
        dims = dims_of(arrays, path)
        strategy.check_shape(layer, dims, array.shape, mesh)
        stacked |= "layers" in dims.split()
    if strategy.axes("layers") and not stacked:
        raise InputError(
            f"The strategy {strategy.layout!r} splits 'layers', and the model's blocks are not stacked; load it "
            "with mistral_eqx.load_stacked, or split it with mistral_eqx.shard(mistral_eqx.nn.stack(model), mesh, "
            "strategy)."
        )


def put_named(module: Model, name: str, dims: Mapping[str, str], mesh: Mesh, strategy: Strategy) -> Model:
    """Splits the arrays of a module over the devices of a mesh.

    **Arguments:**

    - `module`: a module whose arrays are on one device or on the host.
    - `name`: what it is called in a message.
    - `dims`: the dimensions of each array, by its path in the module.
    - `mesh`, `strategy`: the devices, and which dimensions are split over which axes.
    """

    def placed(path: KeyPath, array: Array) -> Array:
        own = dims[jax.tree_util.keystr(path, simple=True, separator=".")]
        strategy.check_shape(name, own, array.shape, mesh)
        return put_on_mesh(array, mesh, strategy.spec(own))

    arrays, static = eqx.partition(module, eqx.is_array)
    return eqx.combine(jax.tree_util.tree_map_with_path(placed, arrays), static)


def with_strategy(model: PyTree, strategy: Strategy) -> PyTree:
    """The same module with another strategy in each layer."""
    return jax.tree.map(
        lambda leaf: strategy if isinstance(leaf, Strategy) else leaf,
        model,
        is_leaf=lambda leaf: isinstance(leaf, Strategy),
    )


def with_auto_axes(mesh: Mesh) -> Mesh:
    """The same mesh with axes of type `Auto`.

    Functions in `shard_map` write out every collective; their arguments may be split in any way.
    """
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def put_on_mesh(x: Array | np.ndarray, mesh: Mesh, spec: PartitionSpec) -> Array:
    """Puts the shards of an array on a mesh, from this process or from all of them.

    **Arguments:**

    - `x`: an array of which each process has the whole, or one that is split over the same devices already.
    - `mesh`, `spec`: the devices, and how the array is split over them.
    """
    sharding = NamedSharding(mesh, spec)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # Each process provides the shards of its own devices.
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def gather_to_host(x: Array) -> np.ndarray:
    """Gathers an array to the host, on every process, however the array is split."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def einshard(x: Array | np.ndarray, expression: str, mesh: Mesh) -> Array:
    """Splits any array by an expression in the manner of einsum.

    ```python
    mx.einshard(x, "batch@dp seq embed@tp", mesh)
    mx.einshard(x, "... embed@tp", mesh)
    ```

    The mesh is an argument, because only arrays of one mesh can meet in a collective.

    **Arguments:**

    - `x`: a JAX or numpy array. Each of several processes passes the whole, and its devices receive their shards.
    - `expression`: one word for each dimension, in order: a name, with `@axis` or `@axis,axis` where it is split. `...`
        stands for any number of dimensions that are not split.
    - `mesh`: the devices.

    **Returns:** the array on the mesh, replicated along axes that the expression does not name.

    **Raises:** `ValueError` if the expression does not fit the array or the mesh.
    """
    if not isinstance(x, jax.Array | np.ndarray):
        raise InputError(f"einshard splits an array, not {shown(x)}; convert it with numpy.asarray.", key="x")
    checked(mesh, Mesh, "mesh", remedy="make one with mistral_eqx.make_mesh")
    words = checked(expression, str, "expression", remedy="for example 'batch@dp seq embed@tp'").split()
    if words.count("...") > 1:
        raise InputError(f"The expression {expression!r} has more than one '...'; keep one.")
    if "..." in words:
        at = words.index("...")
        words[at : at + 1] = ["."] * (x.ndim - len(words) + 1)
    if len(words) != x.ndim:
        raise InputError(
            f"The expression {expression!r} does not name the {x.ndim} dimensions of the array, which has shape "
            f"{x.shape}; give one word for each dimension, or '...' for those that are not split."
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
    check_same("expression", expression)
    return put_on_mesh(x, mesh, layout.spec(" ".join(names)))
