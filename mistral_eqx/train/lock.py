"""One process a run."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from ..errors import InputError


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process, until the block or the process ends, however it ends.

    **Raises:** `ValueError` that names the process that holds it.
    """
    if jax.process_index() > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(20).strip() or "another"
            raise InputError(
                f"Process {owner} trains in {folder}; wait until it ends, or give this run a folder of its own.",
                file=folder,
            ) from None
        with contextlib.suppress(OSError):  # a disk that is full has no room for the number
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield
