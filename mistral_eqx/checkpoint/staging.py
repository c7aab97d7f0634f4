"""A folder that appears under its name only when everything in it has been written."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError


# The files by one of which a folder is known that may be replaced.
_KNOWN_BY = {"checkpoint": {"config.json", "params.json"}, "PEFT adapter": {"adapter_config.json"}}


@contextlib.contextmanager
def staged(target: str | os.PathLike[str], *, overwrite: bool = False, what: str = "checkpoint") -> Iterator[Path]:
    """Gives a folder to write into, and moves it to its place at the end.

    **Arguments:**

    - `target`: where the folder will stand. Folders above it are made.
    - `overwrite`: whether one that stands there is replaced, with all its files.
    - `what`: is written, and may be replaced: a `"checkpoint"` or a `"PEFT adapter"`.

    **Returns:** a context manager for a hidden folder beside `target`. If the block raises, it is removed and `target`
    is as it was; if the process is killed, it stays behind under its hidden name.

    **Raises:** `ValueError` if something stands there that may not be replaced.
    """
    target = Path(target).expanduser().resolve()
    expect_free(target, overwrite, what)
    tag = uuid.uuid4().hex[:8]
    folder = target.with_name(f".{target.name}.partial-{tag}")
    folder.mkdir(parents=True)
    try:
        yield folder
        expect_free(target, overwrite, what)
        replaced = target.with_name(f".{target.name}.replaced-{tag}")
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def expect_free(target: str | os.PathLike[str], overwrite: bool, what: str = "checkpoint"):
    """Refuses, with a `ValueError`, a target at which something stands that may not be replaced."""
    target = Path(target).expanduser().resolve()
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{str(target)!r} is a file, but a {what} is written as a folder; give another path.")
    names = {file.name for file in target.iterdir()}
    if not names:
        return
    if not overwrite:
        raise InputError(
            f"The folder {str(target)!r} is not empty; give another path, or allow it to be replaced (overwrite)."
        )
    others = {name for kind, known in _KNOWN_BY.items() if kind != what for name in known}
    if names.isdisjoint(_KNOWN_BY[what]) or names & others:
        raise InputError(
            f"The folder {str(target)!r} holds other files than a {what}, which would be lost; give another path."
        )
