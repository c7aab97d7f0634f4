"""What other people's tokenizer libraries raise, as one sentence that names the file."""

import contextlib
import os
from collections.abc import Iterator

from ..errors import InputError


# A tokenizer's file has a few megabytes; the largest vocabularies in use take half of this.
LARGEST = 64 * 2**20


@contextlib.contextmanager
def blame(file: str | os.PathLike[str], complaint: str, remedy: str = "fetch it again") -> Iterator[None]:
    """Turns whatever a library raises into an `InputError`.

    **Arguments:**

    - `file`: which it was given.
    - `complaint`: what a message begins with, the file's name included.
    - `remedy`: what it says at the end.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # A panic of Rust is no `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("Exception: ").split())
        reason = reason if len(reason) <= 160 else f"{reason[:157]}..."
        raise InputError(f"{complaint} ({reason}); {remedy}.", file=file) from error
