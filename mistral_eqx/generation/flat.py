"""A module as a list of its arrays."""

import functools
from collections.abc import Hashable, Iterable
from typing import Any

import jax
from jaxtyping import PyTree


@jax.tree_util.register_pytree_node_class
class Flat:
    """A module whose arrays are in one list.

    A compiled function takes its arguments apart at each call. For a model of many modules that takes milliseconds, as
    long as a small model takes to decode a token; for a list it takes microseconds.

    **Arguments:**

    - `tree`: a module.
    """

    def __init__(self, tree: PyTree):
        self._leaves, structure = jax.tree.flatten(tree)
        self._structure = _known(structure)

    @property
    def tree(self) -> Any:
        """The module."""
        return jax.tree.unflatten(self._structure.value, self._leaves)

    @property
    def structure(self) -> Hashable:
        """What two modules of the same kind share, such as copies with other weights."""
        return self._structure

    def tree_flatten(self) -> tuple[list[Any], "_Structure"]:
        return self._leaves, self._structure

    @classmethod
    def tree_unflatten(cls, structure: "_Structure", leaves: Iterable[Any]) -> "Flat":
        flat = object.__new__(cls)
        flat._leaves, flat._structure = list(leaves), structure
        return flat


class _Structure:
    """The structure of a tree, which is compared with itself at no cost."""

    def __init__(self, value: Hashable):
        self.value = value


# Equal structures are one object.
_known = functools.lru_cache(maxsize=64)(_Structure)
