"""One process a run."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from ..errors import InputError
from ..locks import try_lock


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process, until the block or the process ends, however it ends.

    **Raises:** `InputError` that names the process that holds it.
    """
    if jax.process_index() > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+b") as file:
        if not try_lock(file):
            file.seek(0)
            owner = file.read(20).decode(errors="replace").strip() or "another"
            raise InputError(
                f"Process {owner} trains in {folder}; wait until it ends, or give this run a folder of its own.",
                file=folder,
            )
        with contextlib.suppress(OSError):  # a disk that is full has no room for the number
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            file.flush()
        yield
