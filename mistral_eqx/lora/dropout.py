"""Keys for dropout, put into a model's adapters for the time of one forward pass."""

import dataclasses
import itertools
from typing import Any, TypeVar

import jax
import jax.random as jr
from jaxtyping import Array, Int, Key, PRNGKeyArray

from .weight import LoRAWeight


Tree = TypeVar("Tree")


def with_keys(tree: Tree, key: PRNGKeyArray, rows: Int[Array, " batch"], *, layers: int | None = None) -> Tree:
    """Puts a key for each row of a batch into all adapters that have dropout, so that they drop entries.

    **Arguments:**

    - `tree`: a model, or a part of one.
    - `key`: from it each adapter has keys of its own.
    - `rows`: which rows of the whole batch those are that come in.
    - `layers`: the first axis of the arrays of stacked blocks, each of which has keys of its own; `None` without one.
    """
    numbers = itertools.count()

    def by_row(key: PRNGKeyArray) -> Key[Array, " batch"]:
        return jax.vmap(jr.fold_in, (None, 0))(key, rows)

    def with_key(node: Any) -> Any:
        if not isinstance(node, LoRAWeight):
            return node
        node = dataclasses.replace(node, base=walked(node.base))
        if not node.dropout:
            return node
        own = jr.fold_in(key, next(numbers))
        keys = by_row(own) if layers is None else jax.vmap(by_row)(jr.split(own, layers))
        return dataclasses.replace(node, key=keys)

    def walked(tree: Any) -> Any:
        return jax.tree.map(with_key, tree, is_leaf=lambda node: isinstance(node, LoRAWeight))

    return walked(tree)
