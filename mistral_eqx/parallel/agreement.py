"""What has to be the same on all processes is compared before they run into a collective with different programs."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..errors import InputError
from .watch import running


def agree(what: str, value: str) -> None:
    """Makes sure that all processes hold the same value.

    With one process it returns at once. With several, all of them must call it, in the same order: each learns the
    digests of the others.

    **Arguments:**

    - `what`: what is compared, as the sentence of the error names it, such as `"strategy"`.
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


def share(text: str | None) -> Any:
    """Process 0's text, such as a prompt that only it can read, on every process.

    All processes must call it, in the same order. The others wait as long as it takes: a user may be thinking.

    **Arguments:**

    - `text`: what to share; of the other processes it is ignored.

    **Returns:** the text of process 0.

    **Raises:** `ValueError` if there are several processes that [`mistral_eqx.parallel.initialize`][] did not start.
    """
    watch = running()
    if watch is not None:
        return watch.share(text)
    if jax.process_count() > 1:
        raise InputError(
            "A text cannot be shared between processes that jax.distributed.initialize started; call "
            "mistral_eqx.parallel.initialize in its place."
        )
    return text


def _listed(processes: list[int]) -> str:
    """For example `"1, 2 and 3 differ"`; of many, the first ones and how many there are."""
    if len(processes) == 1:
        return f"{processes[0]} differs"
    named = [str(process) for process in processes]
    if len(named) > 8:
        named = [*named[:7], f"{len(named) - 7} more"]
    return f"{', '.join(named[:-1])} and {named[-1]} differ"
