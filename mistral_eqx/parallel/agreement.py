"""Checks that processes agree, before they meet in a collective with different programs."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..errors import InputError
from .watch import running


def check_same(what: str, value: str) -> None:
    """Checks that all processes hold the same value.

    With one process it returns at once. With several, all of them must call it, in the same order: they exchange
    digests of their values.

    **Arguments:**

    - `what`: the name of the value in the error's message, such as `"strategy"`.
    - `value`: this process's value, as text.

    **Raises:** `ValueError`, on every process, if they differ.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    different = np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
    if different:
        raise InputError(
            f"The {what} is not the same on all processes: {_listed(different)} from 0; start all of them with the "
            "same arguments and files."
        )


def broadcast(text: str | None) -> Any:
    """Broadcasts a text of process 0, such as a prompt that only process 0 can read, to all processes.

    All processes must call it, in the same order. The others wait without a limit: process 0 may wait for a user.

    **Arguments:**

    - `text`: the text to broadcast; ignored on the other processes.

    **Returns:** the text of process 0.

    **Raises:** `ValueError` if there are several processes that [`mistral_eqx.parallel.initialize`][] did not start.
    """
    watch = running()
    if watch is not None:
        return watch.broadcast(text)
    if jax.process_count() > 1:
        raise InputError(
            "A text cannot be broadcast to processes that jax.distributed.initialize connected; call "
            "mistral_eqx.parallel.initialize instead."
        )
    return text


def number_of_first(number: int) -> int:
    """Gives a number of process 0, of 32 bits, to all processes; all of them must call it, in the same order."""
    return int(multihost_utils.broadcast_one_to_all(np.uint32(number)))


def _listed(processes: list[int]) -> str:
    """For example `"1, 2 and 3 differ"`; of more than eight, the first seven and the number of the others."""
    if len(processes) == 1:
        return f"{processes[0]} differs"
    named = [str(process) for process in processes]
    if len(named) > 8:
        named = [*named[:7], f"{len(named) - 7} more"]
    return f"{', '.join(named[:-1])} and {named[-1]} differ"
