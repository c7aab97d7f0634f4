"""`jax.shard_map` for functions of Equinox modules, whose specs follow from the names of their dimensions."""

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


# The metadata of a field of stacked modules: the first dimension of all of their arrays, such as "layers ". "layers+"
# joins it, as the major part, to the first dimension that they have anyway.
LEADING = "leading dimension"


class AbstractNamed(eqx.Module):
    """A module that names the dimensions of its arrays in a method, because its annotations cannot."""

    @abc.abstractmethod
    def array_dims(self) -> dict[str, str]:
        """The dimensions of each array, by its path in this module: `{"weight.value": "hidden embed"}`."""


def specs(tree: PyTree, strategy: Strategy) -> PyTree[PartitionSpec]:
    """The `PartitionSpec` of each array of a module.

    The dimensions of an array are those of its jaxtyping annotation, `Float[Array, "batch kv_heads kv_seq head_dim"]`,
    or those that an enclosing [`mistral_eqx.parallel.AbstractNamed`][] module gives. The dimension in the metadata
    `LEADING` of an enclosing field comes before them.

    **Arguments:**

    - `tree`: a module, or several; its arrays may be `jax.ShapeDtypeStruct`.
    - `strategy`: which dimensions are split over which mesh axes.

    **Returns:** a PyTree like `tree` with a `PartitionSpec` for each array, and `None` for everything else.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: strategy.spec(dims_of(tree, path)) if _is_array(leaf) else None, tree
    )


def spmd(fn: Callable[..., Any], mesh: Mesh | None, in_specs: PyTree, out_specs: PyTree) -> Callable[..., Any]:
    """Runs a function on each device of a mesh, with that device's shards of the arguments.

    The mesh is entered once: inside `jax.shard_map`, and without a mesh, the result is `fn` itself.

    **Arguments:**

    - `fn`: takes and returns PyTrees; inside it, shapes are local and every collective is written out.
    - `mesh`: the mesh, or `None`.
    - `in_specs`: for each argument, a PyTree of `PartitionSpec`, or one `PartitionSpec` for all of its arrays.
    - `out_specs`: likewise for the result, which may hold arrays only.
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
    """Wraps a function that does not mark along which mesh axes its results vary, such as a Pallas kernel.

    The results are marked like the arguments. Do not differentiate through it: inside it, JAX does not know which
    gradients to add up over devices.

    **Arguments:**

    - `fn`: takes and returns arrays, and exchanges nothing with other devices.
    """

    def call(*arguments: Array) -> PyTree[Array]:
        if not entered():
            return fn(*arguments)
        same = PartitionSpec()
        unchecked = jax.shard_map(fn, in_specs=same, out_specs=same, axis_names=set(), check_vma=False)
        # Under `jit`, because a shard_map that is not compiled cannot contain another.
        results, structure = jax.tree.flatten(jax.jit(unchecked)(*arguments))
        return jax.tree.unflatten(structure, vary_alike(*arguments, *results)[len(arguments) :])

    return call


def entered() -> bool:
    """Whether this runs inside `jax.shard_map`, where shapes are those of one device's shards."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def dims_of(root: PyTree, path: KeyPath) -> str:
    """The names of the dimensions of an array of a module."""
    node, annotation, leading = root, "", ""
    for depth, key in enumerate(path):
        if isinstance(node, AbstractNamed):
            return leading + node.array_dims()[jax.tree_util.keystr(path[depth:], simple=True, separator=".")]
        if isinstance(key, jax.tree_util.GetAttrKey):
            field = next(field for field in dataclasses.fields(node) if field.name == key.name)
            annotation, leading = field.type, leading + field.metadata.get(LEADING, "")
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        elif isinstance(key, jax.tree_util.DictKey):
            node = node[key.key]
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, AbstractArray):
            return leading + kind.dim_str
    raise InputError(
        f"The dimensions of {jax.tree_util.keystr(path)} are unknown; annotate the field with jaxtyping, as in "
        "Float[Array, 'embed']."
    )
