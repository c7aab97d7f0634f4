"""Keys for dropout, put into a model's adapters for the time of one forward pass."""

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

    - `tree`: a model, or a part of one.
    - `key`: of the kind threefry; from it each adapter has keys of its own.
    - `rows`: which rows of the whole batch those are that come in.
    - `layers`: the first axis of the arrays of stacked blocks, each of which has keys of its own; `None` without one.
    """
    count = len(_keys(tree))
    if not count:
        return tree
    shape = (count, *(() if layers is None else (layers,)))
    # All of them at once: each hash is a loop of its own to compile.
    numbers = jnp.arange(count * (layers or 1), dtype=jnp.int32)
    fold = jax.vmap(jr.fold_in, (None, 0))
    keys = jax.vmap(fold, (0, None))(fold(key, numbers), rows).reshape(*shape, -1)
    return eqx.tree_at(_keys, tree, [keys[number] for number in range(count)], is_leaf=lambda leaf: leaf is None)


def _keys(tree: PyTree) -> list[PyTree]:
    """Of all adapters with dropout, those below other adapters included."""
    return [node.key for node in _adapters(tree) if node.dropout]


def _adapters(tree: PyTree) -> Iterator[LoRAWeight]:
    for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, LoRAWeight)):
        if isinstance(node, LoRAWeight):
            yield node
            yield from _adapters(node.base)
