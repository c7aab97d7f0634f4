"""Locks on files, which a process that dies does not keep."""

import sys
from typing import IO


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]):
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: IO[bytes]):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def try_lock(file: IO[bytes]) -> bool:
    """Locks an open file for this process, until it closes the file or ends.

    **Returns:** whether no other process has locked it. Where the file system has no locks, that is not known, and
    true.
    """
    try:
        _lock(file)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True
