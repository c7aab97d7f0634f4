"""The trained leaves of a model, and casts of their precision."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..lora import has_adapters, is_adapter
from ..nn import Stacked


def trained(model: Stacked) -> PyTree[bool]:
    """Which leaves are trained: the adapters if the model has any, otherwise all floating-point weights."""
    if has_adapters(model):
        return is_adapter(model)
    return jax.tree.map(lambda leaf: is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact), model)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or the shape of one; a plan has shapes in place of arrays."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def cast_floats(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Casts the floating-point arrays of a tree."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)
