"""What several processes do together: if one of them fails, the others are told and do not wait for it."""

import contextlib
import hashlib
from collections.abc import Callable
from typing import TypeVar

from ..parallel import agree
from .reader import Checkpoint


Result = TypeVar("Result")


def on_all(
    what: str, act: Callable[[], Result], several: bool, told: Callable[[Result], str] = lambda result: ""
) -> Result:
    """Does something on all processes, and makes sure that it worked on all of them.

    **Arguments:**

    - `what`: what is compared, as the sentence of the error names it, such as `"checkpoint"`.
    - `act`: does it; without any exchange with the other processes.
    - `several`: whether there are other processes that do the same.
    - `told`: the text that must be the same on all of them, from what `act` returned.

    **Returns:** what `act` returned.

    **Raises:** what `act` raised here; `ValueError` if it raised something elsewhere, or if the texts differ.
    """
    try:
        result = act()
        text = f"done: {told(result)}" if several else ""
    except Exception as error:
        if several:
            with contextlib.suppress(ValueError):
                agree(what, f"failed: {error}")
        raise
    if several:
        agree(what, text)
    return result


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest by which two copies of a checkpoint are told apart without reading them.

    It covers the config, each tensor's name, shape and stored type, and the first and the last row of each.
    """
    digest = hashlib.sha256(repr((checkpoint.format, checkpoint.config)).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, tensor.shape, tensor.stored)).encode())
        if tensor.shape and (count := tensor.shape[0]):
            digest.update(tensor.rows(0, 1).tobytes())
            digest.update(tensor.rows(count - 1, count).tobytes())
    return digest.hexdigest()
