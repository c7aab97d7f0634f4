"""Rematerialisation policies: what the backward pass computes again, to take less memory."""

from collections.abc import Callable
from typing import Any

import jax

from ..checks import checked
from ..errors import InputError
from ..nn.linear import LINEAR


_WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "none": lambda repeat: repeat,
    "block": lambda repeat: jax.checkpoint(repeat, prevent_cse=False),
    "dots": lambda repeat: jax.checkpoint(
        repeat, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(LINEAR)
    ),
}


def rematerialised(remat: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function that applies a policy to the function of one repeat of the layer pattern.

    **Arguments:**

    - `remat`: `"none"` keeps all activations. `"block"` keeps the residual stream between the repeats alone, and
        computes the rest again. `"dots"` also keeps the results of linear layers.

    **Raises:** `ValueError` if there is no such policy.
    """
    if checked(remat, str, "remat") not in _WRAPPERS:
        policies = ", ".join(map(repr, _WRAPPERS))
        raise InputError(f"There is no rematerialisation policy {remat!r}; take one of {policies}.", key="remat")
    return _WRAPPERS[remat]
