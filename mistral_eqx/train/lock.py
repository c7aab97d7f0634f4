"""Only one process trains in a run's folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from ..errors import InputError
from ..locks import try_lock


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks a run's folder for this process until the block or the process ends.

    **Raises:** `InputError` with the id of the process that holds the lock.
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
                f"Process {owner} trains in {folder}; wait until it ends, or use another folder for this run.",
                file=folder,
            )
        with contextlib.suppress(OSError):  # a full disk has no room for the process id
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            file.flush()
        yield
