"""The adaptable layers of a model, by their path."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import PyTree

from ..nn import Embedding, Linear, Unembedding


Site = Linear | Embedding | Unembedding
Tree = TypeVar("Tree")


def sites(model: PyTree) -> dict[str, Site]:
    """The adaptable layers by their path, such as `"blocks.0.attention.q_proj"`."""
    nodes = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_site)[0]
    return {_path(keys): node for keys, node in nodes if _is_site(node)}


def at_sites(change: Callable[[str, Site], Site], model: Tree) -> Tree:
    """The model with each adaptable layer replaced by `change` of its path and itself."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, node: change(_path(keys), node) if _is_site(node) else node, model, is_leaf=_is_site
    )


def dims_of(site: Site) -> tuple[str, str]:
    """The names of the input and output dimensions of a layer's weight."""
    return (site.in_dims, site.out_dims) if isinstance(site, Linear) else ("embed", "vocab")


def _is_site(node: PyTree) -> bool:
    return isinstance(node, Linear | Embedding | Unembedding)


def _path(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")
