"""Steps that all processes run. If one process fails, the others raise an error instead of waiting for it."""

import contextlib
import hashlib
from collections.abc import Callable
from typing import TypeVar

from ..parallel import check_same
from .reader import Checkpoint


Result = TypeVar("Result")


def run_on_all(
    name: str, run: Callable[[], Result], several: bool, summary: Callable[[Result], str] = lambda result: ""
) -> Result:
    """Runs a step on all processes, and checks that it succeeded on all of them.

    **Arguments:**

    - `name`: the name of the result in an error message, such as `"checkpoint"`.
    - `run`: the step. It must not communicate with the other processes.
    - `several`: whether several processes run this step.
    - `summary`: a text computed from the result, which must be the same on all processes.

    **Returns:** the result of `run`.

    **Raises:** the exception of `run` on this process; `ValueError` if `run` raised on another process, or if the
    summaries differ.
    """
    try:
        result = run()
        text = f"done: {summary(result)}" if several else ""
    except Exception as error:
        if several:
            with contextlib.suppress(ValueError):
                check_same(name, f"failed: {error}")
        raise
    if several:
        check_same(name, text)
    return result


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest that distinguishes two copies of a checkpoint without reading them whole.

    It covers the config, each tensor's name, shape and stored type, and the first and the last row of each.
    """
    digest = hashlib.sha256(repr((checkpoint.format, checkpoint.config)).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, tensor.shape, tensor.stored)).encode())
        if tensor.shape and (count := tensor.shape[0]):
            digest.update(tensor.rows(0, 1).tobytes())
            digest.update(tensor.rows(count - 1, count).tobytes())
    return digest.hexdigest()
