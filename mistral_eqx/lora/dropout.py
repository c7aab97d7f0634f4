"""Puts keys for dropout into a model's adapters, for one forward pass."""

from collections.abc import Iterator
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .weight import LoRAWeight


Tree = TypeVar("Tree")


def with_keys(tree: Tree, key: PRNGKeyArray, rows: Int[Array, " batch"], *, layers: int | None = None) -> Tree:
    """Puts a key for each row of a batch into all adapters that have dropout, so that they drop entries.

    **Arguments:**

    - `tree`: a model, or a part of a model.
    - `key`: a threefry key, from which each adapter gets its own keys.
    - `rows`: the index of each row of the forward pass in the whole batch.
    - `layers`: the length of the first axis of stacked blocks, each of which gets its own keys; `None` for other trees.
    """
    count = len(_keys(tree))
    if not count:
        return tree
    shape = (count, *(() if layers is None else (layers,)))
    # All keys at once, because each separate hash would be one more loop to compile.
    numbers = jnp.arange(count * (layers or 1), dtype=jnp.int32)
    fold = jax.vmap(jr.fold_in, (None, 0))
    keys = jax.vmap(fold, (0, None))(fold(key, numbers), rows).reshape(*shape, -1)
    return eqx.tree_at(_keys, tree, [keys[number] for number in range(count)], is_leaf=lambda leaf: leaf is None)


def _keys(tree: PyTree) -> list[PyTree]:
    """The keys of all adapters with dropout, adapters of adapters included."""
    return [node.key for node in _adapters(tree) if node.dropout]


def _adapters(tree: PyTree) -> Iterator[LoRAWeight]:
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, LoRAWeight)):
        if isinstance(node, LoRAWeight):
            yield node
            yield from _adapters(node.base)
