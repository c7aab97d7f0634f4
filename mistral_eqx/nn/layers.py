"""The layers of a model that have a weight, by their path."""

from collections.abc import Callable
from typing import TypeGuard, TypeVar

import jax
from jaxtyping import PyTree

from .block import check_whole
from .embedding import Embedding, Unembedding
from .experts import ExpertLinear
from .linear import Linear


AdaptableLayer = Linear | Embedding | Unembedding
QuantizableLayer = AdaptableLayer | ExpertLinear
Tree = TypeVar("Tree")


def adaptable_layers(model: PyTree) -> dict[str, AdaptableLayer]:
    """The adaptable layers by their path, such as `"blocks.0.attention.q_proj"`."""
    return {path: layer for path, layer in quantizable_layers(model).items() if isinstance(layer, AdaptableLayer)}


def quantizable_layers(model: PyTree) -> dict[str, QuantizableLayer]:
    """The adaptable layers and those of experts, by their path."""
    check_whole(model)
    nodes = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_quantizable)[0]
    return {_path(keys): node for keys, node in nodes if _is_quantizable(node)}


def map_layers(change: Callable[[str, AdaptableLayer], AdaptableLayer], model: Tree) -> Tree:
    """The model with each adaptable layer replaced by `change` of its path and itself."""
    return map_quantizable(
        lambda path, layer: change(path, layer) if isinstance(layer, AdaptableLayer) else layer, model
    )


def map_quantizable(change: Callable[[str, QuantizableLayer], QuantizableLayer], model: Tree) -> Tree:
    """The model with each layer that can be quantized replaced by `change` of its path and itself."""
    check_whole(model)
    return jax.tree_util.tree_map_with_path(
        lambda keys, node: change(_path(keys), node) if _is_quantizable(node) else node, model, is_leaf=_is_quantizable
    )


def dims_of(layer: QuantizableLayer) -> tuple[str, str]:
    """The names of the input and output dimensions of a layer's weight."""
    if isinstance(layer, ExpertLinear):
        return layer.in_dims, f"experts {layer.out_dims}"
    return (layer.in_dims, layer.out_dims) if isinstance(layer, Linear) else ("embed", "vocab")


def _is_quantizable(node: PyTree) -> TypeGuard[QuantizableLayer]:
    return isinstance(node, QuantizableLayer)


def _path(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")
