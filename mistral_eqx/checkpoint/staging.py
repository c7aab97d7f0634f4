"""Writes a folder under a hidden name, and renames it when all of its files are complete."""

import contextlib
import errno
import functools
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .. import interrupts
from ..errors import InputError
from .exchange import exchange


try:
    import fcntl
except ImportError:  # Windows, which does not remove open files
    fcntl = None

# The files that mark each kind of folder. A folder of another kind is never replaced.
_MARKER_FILES = {"checkpoint": {"config.json", "params.json"}, "PEFT adapter": {"adapter_config.json"}}

# Names in the hidden folder: the lock file of the writing process, the new folder, and the old folder while it is
# being replaced.
_MARK, _NEW, _OLD = ".mistral_eqx", "new", "old"


@contextlib.contextmanager
def staged(target: str | os.PathLike[str], *, overwrite: bool = False, kind: str = "checkpoint") -> Iterator[Path]:
    """Gives a temporary folder to write into, and renames it to the target at the end.

    An existing folder is replaced atomically, so that at any moment, also after a kill, the target is the old or the
    new folder. If the system has no atomic exchange, the next call or `restore` puts the old folder back after a kill.

    **Arguments:**

    - `target`: the path of the folder. Missing parents are made.
    - `overwrite`: whether to replace an existing folder with all its files.
    - `kind`: the kind of folder to write, and to replace: `"checkpoint"` or `"PEFT adapter"`.

    **Returns:** a context manager for a folder inside a hidden folder beside `target`. If the block raises, the hidden
    folder is removed and `target` is unchanged. If the process is killed, the hidden folder `.name.partial-...` stays
    until the next call for `target`. If several processes write one target, the last one to finish wins.

    **Raises:** `InputError` if `target` exists and may not be replaced, or cannot be written.
    """
    target = _resolved(target)
    restore(target)
    expect_free(target, overwrite, kind)
    with contextlib.ExitStack() as cleaning:
        with _as_input_error(target):
            missing = [parent for parent in target.parents if not parent.exists()]
            cleaning.callback(_remove_empty, missing)
            for parent in reversed(missing):
                parent.mkdir(exist_ok=True)
        folder = cleaning.enter_context(hidden_beside(target, target))
        yield folder
        with interrupts.held(), _as_input_error(target):
            _move(folder.parent, target, overwrite, kind)


@contextlib.contextmanager
def hidden_beside(path: Path, target: Path) -> Iterator[Path]:
    """Gives a folder inside a hidden folder `.name.partial-...` beside `path`, which is removed at the end.

    After a kill the hidden folder stays until `restore` is called for `path`.

    **Arguments:**

    - `target`: the final folder of the files, which error messages name.
    """
    with contextlib.ExitStack() as cleaning:
        with _as_input_error(target):
            hidden = _make_hidden(path, cleaning)
        with _as_input_error(target, hidden / _NEW):
            yield hidden / _NEW


def number_of(folder: Path) -> int:
    """The number by which another process finds the folder of `staged` with `staged_elsewhere`."""
    return int(folder.parent.name.rpartition("-")[2], 16)


@contextlib.contextmanager
def staged_elsewhere(target: str | os.PathLike[str], number: int) -> Iterator[Path]:
    """Gives the temporary folder of another process, to write into it too. That process renames or removes it.

    **Arguments:**

    - `target`: the path of the folder, as that process has it.
    - `number`: the number that `number_of` returns there.

    **Raises:** `InputError` if this process cannot see the folder, or cannot write into it.
    """
    target = _resolved(target)
    folder = _hidden_beside(target, number) / _NEW
    if not folder.is_dir():
        raise InputError(
            f"This process does not see the folder {str(folder.parent)!r}, in which process 0 writes; give the same "
            "path on all processes, in a file system that their hosts share.",
            file=target,
        )
    with _as_input_error(target, folder):
        yield folder


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes in this context. If the system has no such lock, it does nothing."""
    with contextlib.ExitStack() as cleaning:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                opened = os.open(folder, os.O_RDONLY)
                cleaning.callback(os.close, opened)
                fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def expect_free(target: str | os.PathLike[str], overwrite: bool, kind: str = "checkpoint"):
    """Raises an `InputError` if the target exists and may not be replaced."""
    target = _resolved(target)
    with _as_input_error(target):
        if not os.path.lexists(target):
            return
        if not target.is_dir():
            raise InputError(
                f"{str(target)!r} is a file, but a {kind} is written as a folder; give another path.", file=target
            )
        names = {file.name for file in target.iterdir()}
    if not names:
        return
    if not overwrite:
        raise InputError(
            f"The folder {str(target)!r} is not empty; give another path, or allow it to be replaced (overwrite).",
            file=target,
        )
    if not _may_be_replaced(names, kind):
        raise InputError(
            f"The folder {str(target)!r} holds other files than a {kind}, which would be lost; give another path.",
            file=target,
        )


def restore(target: str | os.PathLike[str]):
    """Puts back a folder that a killed process had moved away, and removes the hidden folders of killed processes.

    Hidden folders of running processes, and folders without the lock file of this package, are not touched.
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


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Makes a folder if it does not exist, and returns its absolute path.

    **Raises:** `InputError` if the folder cannot be made.
    """
    folder = _resolved(folder)
    with _as_input_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _may_be_replaced(names: set[str], kind: str) -> bool:
    others = {name for other, markers in _MARKER_FILES.items() if other != kind for name in markers}
    return not names or not (names.isdisjoint(_MARKER_FILES[kind]) or names & others)


def _resolved(target: str | os.PathLike[str]) -> Path:
    try:
        return Path(target).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"The path {os.fspath(target)!r} cannot be written ({error}); give another path.", file=target
        ) from error


@contextlib.contextmanager
def _as_input_error(target: Path, folder: Path | None = None) -> Iterator[None]:
    """Turns an `OSError` into an `InputError` about `target`. A file in `folder` is named by its final path."""
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
            f"{str(file)!r} cannot be written: {error.strerror}; {'free some space' if full else 'fix that'}, or give "
            "another path.",
            file=file,
        ) from error


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Adds the file's name to an `OSError` without one: errors from reading and writing have no name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(file)
        raise


def _hidden_beside(target: Path, number: int) -> Path:
    return target.with_name(f".{target.name}.partial-{number:08x}")


def _make_hidden(target: Path, cleaning: contextlib.ExitStack) -> Path:
    """Makes the hidden folder, and holds its lock until `cleaning` removes it."""
    for _ in range(10):
        hidden = _hidden_beside(target, secrets.randbits(32))
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
                # `restore` in another process took the new folder for a stale one before it was locked.
                continue
            cleaning.enter_context(own.pop_all())
            return hidden
    raise InputError(f"{str(target)!r} is being written by other processes; give another path.", file=target)


@contextlib.contextmanager
def _locked(mark: Path, mode: str) -> Iterator[None]:
    """Holds the lock of a hidden folder. The system releases the lock when the process ends.

    **Raises:** `OSError` if the lock file does not exist, or a running process holds the lock.
    """
    with open(mark, mode) as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Without file locks a stale folder cannot be recognised, so `restore` keeps it.
                if mode != "xb" or isinstance(error, BlockingIOError):
                    raise
        yield


def _remove(hidden: Path):
    """Removes a hidden folder. Its lock file goes last, because `restore` ignores a folder without one."""
    # Another thread may still create files in the folder.
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


def _move(hidden: Path, target: Path, overwrite: bool, kind: str):
    """Renames the new folder to the target. A replaced folder moves into the hidden folder, and is removed with it."""
    new, old = hidden / _NEW, hidden / _OLD
    # Another process may create or replace the target at any moment, so each attempt checks it again.
    for _ in range(100):
        expect_free(target, overwrite, kind)
        with contextlib.suppress(FileExistsError, FileNotFoundError), _not_empty_as_exists():
            if not target.exists() or not any(target.iterdir()):
                # This fails if another process has filled the target.
                new.rename(target)
                return
            sync(new)
            if exchange(new, target):
                _undo_if_not_replaceable(new, target, kind)
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
                # The name `_NEW` keeps `restore` from putting the old folder back.
                old.rename(new)
                return
    raise InputError(f"{str(target)!r} is being written by other processes; give another path.", file=target)


@contextlib.contextmanager
def _not_empty_as_exists() -> Iterator[None]:
    """Turns `ENOTEMPTY` into `FileExistsError`: systems differ in the error of a rename to a folder with files."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(*error.args) from error
        raise


def _undo_if_not_replaceable(replaced: Path, target: Path, kind: str):
    """Undoes the exchange and raises, if another process put a folder there that may not be replaced."""
    if not _may_be_replaced({file.name for file in replaced.iterdir()}, kind):
        exchange(replaced, target)
        expect_free(target, True, kind)


def sync(folder: Path):
    """Flushes the files of a new folder to the disk, before they replace old ones or are complete for other hosts."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
