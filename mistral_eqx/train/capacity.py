"""A capacity of experts, in training alone."""

import dataclasses
from typing import Any

import jax

from ..nn import Experts, Stacked


def with_capacity(model: Stacked, factor: float | None) -> Stacked:
    """The model whose experts have a capacity factor; `None` drops no token."""

    def changed(node: Any) -> Any:
        return dataclasses.replace(node, capacity=factor) if isinstance(node, Experts) else node

    return jax.tree.map(changed, model, is_leaf=lambda node: isinstance(node, Experts))
