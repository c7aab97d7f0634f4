"""The trained leaves of a model, and casts of their precision."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..errors import InputError
from ..lora import has_adapters, is_adapter
from ..nn import Stacked
from ..quant import formats


def trained(model: Stacked) -> PyTree[bool]:
    """Which leaves are trained: the adapters if the model has any, otherwise all floating-point weights.

    **Raises:** `InputError` if weights are in blocks and the model has no adapters.
    """
    if has_adapters(model):
        return is_adapter(model)
    if found := formats(model):
        raise InputError(
            f"The model has weights in {' and '.join(found)} blocks, which cannot be trained; load it in floats, as in "
            "mx.load(path, dtype='float32'), or train adapters beside them, as mx.apply_lora adds them."
        )
    return jax.tree.map(lambda leaf: is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact), model)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or the shape of one; a plan has shapes in place of arrays."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def cast_floats(tree: PyTree, dtype: DTypeLike) -> PyTree:
    """Casts the floating-point arrays of a tree."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)
