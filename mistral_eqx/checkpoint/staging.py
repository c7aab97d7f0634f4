"""A folder that appears under its name only when everything in it has been written."""

import contextlib
import errno
import functools
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from .. import interrupts
from ..errors import InputError
from .exchange import exchange


try:
    import fcntl
except ImportError:  # Windows, which removes no file that is open
    fcntl = None

# The files by one of which a folder is known that may be replaced.
_KNOWN_BY = {"checkpoint": {"config.json", "params.json"}, "PEFT adapter": {"adapter_config.json"}}

# In the hidden folder: its mark, which the process that writes keeps locked; what is written; what stood there before,
# while it has no other name.
_MARK, _NEW, _OLD = ".mistral_eqx", "new", "old"


@contextlib.contextmanager
def staged(target: str | os.PathLike[str], *, overwrite: bool = False, what: str = "checkpoint") -> Iterator[Path]:
    """Gives a folder to write into, and moves it to its place at the end.

    A folder that stands there is replaced in one step, so that at any moment, also after a kill, the one or the other
    is there. Where the system has no such step the old one is put back by the next call, or by `restore`.

    **Arguments:**

    - `target`: where the folder will stand. Folders above it are made.
    - `overwrite`: whether one that stands there is replaced, with all its files.
    - `what`: is written, and may be replaced: a `"checkpoint"` or a `"PEFT adapter"`.

    **Returns:** a context manager for a folder in a hidden one beside `target`. If the block raises, it is removed and
    `target` is as it was. If the process is killed, it stays behind, as `.name.partial-...`, until the next call for
    `target`. Of several processes that write one target, the last one's folder stands there at the end.

    **Raises:** `InputError` if something stands there that may not be replaced, or it cannot be written.
    """
    target = _resolved(target)
    restore(target)
    expect_free(target, overwrite, what)
    with contextlib.ExitStack() as cleaning:
        with _told_of(target):
            made = [parent for parent in target.parents if not parent.exists()]
            cleaning.callback(_remove_empty, made)
            for parent in reversed(made):
                parent.mkdir(exist_ok=True)
        folder = cleaning.enter_context(hidden_beside(target, target))
        yield folder
        with interrupts.held(), _told_of(target):
            _move(folder.parent, target, overwrite, what)


@contextlib.contextmanager
def hidden_beside(path: Path, target: Path) -> Iterator[Path]:
    """Gives a folder in a hidden one beside `path`, `.name.partial-...`, which is removed at the end.

    After a kill it stays, until `restore` is called for `path`.

    **Arguments:**

    - `target`: where its files are going to be, by which name messages call them.
    """
    with contextlib.ExitStack() as cleaning:
        with _told_of(target):
            hidden = _make_hidden(path, cleaning)
        with _told_of(target, hidden / _NEW):
            yield hidden / _NEW


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this is entered, no other process is in it for the same folder; where that cannot be, it does nothing."""
    with contextlib.ExitStack() as cleaning:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                opened = os.open(folder, os.O_RDONLY)
                cleaning.callback(os.close, opened)
                fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def expect_free(target: str | os.PathLike[str], overwrite: bool, what: str = "checkpoint"):
    """Refuses, with an `InputError`, a target at which something stands that may not be replaced."""
    target = _resolved(target)
    with _told_of(target):
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise InputError(
                f"{str(target)!r} is a file, but a {what} is written as a folder; give another path.", file=target
            )
        names = {file.name for file in target.iterdir()}
    if not names:
        return
    if not overwrite:
        raise InputError(
            f"The folder {str(target)!r} is not empty; give another path, or allow it to be replaced (overwrite).",
            file=target,
        )
    if not _may_be_replaced(names, what):
        raise InputError(
            f"The folder {str(target)!r} holds other files than a {what}, which would be lost; give another path.",
            file=target,
        )


def restore(target: str | os.PathLike[str]):
    """Puts back the folder that a run had moved away when it was killed, and removes what such runs left behind.

    What a living process writes is left alone, and so is every folder without the mark of this package.
    """
    target = Path(target)
    pattern = re.compile(re.escape(f".{target.name}.partial-") + "[0-9a-f]{8}")
    with contextlib.suppress(OSError, ValueError):
        for entry in list(os.scandir(target.parent)):
            if not pattern.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
                continue
            hidden = Path(entry)
            with contextlib.suppress(OSError):
                if not any(hidden.iterdir()):
                    hidden.rmdir()
                    continue
                with _locked(hidden / _MARK, "r+b"):
                    if (hidden / _OLD).is_dir() and not os.path.lexists(target):
                        (hidden / _OLD).rename(target)
                    _remove(hidden)


def made(folder: str | os.PathLike[str]) -> Path:
    """The folder, which is made if it is not there.

    **Raises:** `InputError` if it cannot be.
    """
    folder = _resolved(folder)
    with _told_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _may_be_replaced(names: set[str], what: str) -> bool:
    others = {name for kind, known in _KNOWN_BY.items() if kind != what for name in known}
    return not names or not (names.isdisjoint(_KNOWN_BY[what]) or names & others)


def _resolved(target: str | os.PathLike[str]) -> Path:
    try:
        return Path(target).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"The path {os.fspath(target)!r} cannot be written ({error}); give another path.", file=target
        ) from error


@contextlib.contextmanager
def _told_of(target: Path, folder: Path | None = None) -> Iterator[None]:
    """Makes a sentence of what the system says about `target`, or about a file of `folder`, by its name at the end."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        file = target
        if folder is not None and error.filename is not None:
            named = Path(os.fsdecode(error.filename))
            if not named.is_relative_to(folder):
                raise
            file = target / named.relative_to(folder)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise InputError(
            f"{str(file)!r} cannot be written: {error.strerror}; {'make room' if full else 'mend that'}, or give "
            "another path.",
            file=file,
        ) from error


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Puts the file's name into an error of the system that has none: writing and reading do not know it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(file)
        raise


def _make_hidden(target: Path, cleaning: contextlib.ExitStack) -> Path:
    """Makes the hidden folder, which is this process's own until `cleaning` removes it."""
    for _ in range(10):
        hidden = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
        remove = functools.partial(_remove, hidden)
        with contextlib.ExitStack() as own:
            with interrupts.held():
                hidden.mkdir()
                own.enter_context(interrupts.undone_by(remove))
            own.callback(remove)
            try:
                own.enter_context(_locked(hidden / _MARK, "xb"))
                (hidden / _NEW).mkdir()
            except (FileNotFoundError, BlockingIOError):
                # Another process took it for one that was left behind, before it was locked.
                continue
            cleaning.enter_context(own.pop_all())
            return hidden
    raise InputError(f"{str(target)!r} is written by others all the time; give another path.", file=target)


@contextlib.contextmanager
def _locked(mark: Path, mode: str) -> Iterator[None]:
    """Holds the lock of a hidden folder, which ends with its process.

    **Raises:** `OSError` if there is no mark, or a living process has the lock.
    """
    with open(mark, mode) as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Of a file system without locks nobody knows what is left behind; there it stays.
                if mode != "xb" or isinstance(error, BlockingIOError):
                    raise
        yield


def _remove(hidden: Path):
    """Removes a hidden folder, its mark last: without it, it would be taken for somebody else's."""
    # Another thread may still make files in it.
    for _ in range(10):
        with contextlib.suppress(OSError):
            for path in hidden.iterdir():
                if path.name != _MARK:
                    shutil.rmtree(path, ignore_errors=True)
            (hidden / _MARK).unlink(missing_ok=True)
            hidden.rmdir()
        if not hidden.exists():
            return


def _remove_empty(folders: list[Path]):
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _move(hidden: Path, target: Path, overwrite: bool, what: str):
    """Puts the new folder in its place. What it replaces stays in the hidden folder, to be removed with that."""
    new, old = hidden / _NEW, hidden / _OLD
    # Another process may put its own there at any moment; each turn sees what stands there then.
    for _ in range(100):
        expect_free(target, overwrite, what)
        with contextlib.suppress(FileExistsError, FileNotFoundError), _not_empty_is_there():
            if not target.exists() or not any(target.iterdir()):
                # Fails if it is not empty any more.
                new.rename(target)
                return
            _sync(new)
            if exchange(new, target):
                _expect_replaceable(new, target, what)
                return
            target.rename(old)
            try:
                new.rename(target)
            except OSError:
                if not target.exists():
                    old.rename(target)
                    raise
                shutil.rmtree(old, ignore_errors=True)
            else:
                # From here on it is not put back any more.
                old.rename(new)
                return
    raise InputError(f"{str(target)!r} is written by others all the time; give another path.", file=target)


@contextlib.contextmanager
def _not_empty_is_there() -> Iterator[None]:
    """One error, of the two that systems have, for a folder that is renamed to one with files."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(*error.args) from error
        raise


def _expect_replaceable(replaced: Path, target: Path, what: str):
    """Gives back a folder that came there in the last moment, and may not be replaced."""
    if not _may_be_replaced({file.name for file in replaced.iterdir()}, what):
        exchange(replaced, target)
        expect_free(target, True, what)


def _sync(folder: Path):
    """Sees to it that files are on the disk before those that they replace are gone."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
