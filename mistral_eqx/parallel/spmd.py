"""`jax.shard_map` over functions of Equinox modules, whose shardings follow from the names of their dimensions."""

import abc
import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import KeyPath
from jaxtyping import AbstractArray, Array, PyTree

from ..errors import InputError
from .collectives import vary_alike
from .strategy import Strategy


class AbstractNamed(eqx.Module):
    """A module that says itself what the dimensions of its arrays are, since its annotations cannot."""

    @abc.abstractmethod
    def array_dims(self) -> dict[str, str]:
        """The dimensions of each array, by its path in this module: `{"weight.value": "hidden embed"}`."""


def specs(tree: PyTree, strategy: Strategy) -> PyTree[PartitionSpec]:
    """How each array of a module is split over the mesh.

    The dimensions of an array are those of its jaxtyping annotation, `Float[Array, "batch kv_heads kv_seq head_dim"]`,
    or what an [`mistral_eqx.parallel.AbstractNamed`][] module above it says.

    **Arguments:**

    - `tree`: a module, or several; its arrays may be `jax.ShapeDtypeStruct`.
    - `strategy`: which dimensions are split over which mesh axes.

    **Returns:** a PyTree like `tree` with a `PartitionSpec` for each array, and `None` for everything else.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: strategy.spec(_dims(tree, path)) if _is_array(leaf) else None, tree
    )


def spmd(fn: Callable[..., Any], mesh: Mesh | None, in_specs: PyTree, out_specs: PyTree) -> Callable[..., Any]:
    """Runs a function on each device of a mesh, with that device's parts of its arguments.

    The mesh is entered once: inside `jax.shard_map`, or without a mesh, the function is called as it is.

    **Arguments:**

    - `fn`: takes and returns PyTrees; inside it shapes are local and collectives are written by hand.
    - `mesh`: the mesh, or `None`.
    - `in_specs`: for each argument, how its arrays are split: a PyTree of `PartitionSpec`, or one for all of it.
    - `out_specs`: likewise for the result, in which there may be nothing but arrays.
    """
    if mesh is None or entered():
        return fn

    def call(*arguments: PyTree) -> PyTree:
        arrays, static = eqx.partition(arguments, eqx.is_array)
        mapped = jax.shard_map(
            lambda arrays: fn(*eqx.combine(arrays, static)), mesh=mesh, in_specs=(tuple(in_specs),), out_specs=out_specs
        )
        return mapped(arrays)

    return call


def kernel(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a function that cannot say along which mesh axes its results differ, such as a kernel of Pallas.

    They are marked like the arguments. Gradients must not be taken through it: what would be added up over devices is
    not known inside.

    **Arguments:**

    - `fn`: takes and returns arrays, and exchanges nothing with other devices.
    """

    def call(*arguments: Array) -> PyTree[Array]:
        if not entered():
            return fn(*arguments)
        everywhere = PartitionSpec()
        unchecked = jax.shard_map(fn, in_specs=everywhere, out_specs=everywhere, axis_names=set(), check_vma=False)
        results, structure = jax.tree.flatten(unchecked(*arguments))
        return jax.tree.unflatten(structure, vary_alike(*arguments, *results)[len(arguments) :])

    return call


def entered() -> bool:
    """Whether this runs inside `jax.shard_map`, where shapes are those of one device's parts."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _dims(root: PyTree, path: KeyPath) -> str:
    node, annotation = root, ""
    for depth, key in enumerate(path):
        if isinstance(node, AbstractNamed):
            return node.array_dims()[jax.tree_util.keystr(path[depth:], simple=True, separator=".")]
        if isinstance(key, jax.tree_util.GetAttrKey):
            annotation = next(field.type for field in dataclasses.fields(node) if field.name == key.name)
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        elif isinstance(key, jax.tree_util.DictKey):
            node = node[key.key]
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, AbstractArray):
            return kind.dim_str
    raise InputError(
        f"Nothing tells the dimensions of {jax.tree_util.keystr(path)}; annotate the field with jaxtyping, as "
        "Float[Array, 'embed'] does."
    )
