"""Turns errors of third-party tokenizer libraries into one sentence that names the file."""

import contextlib
import os
from collections.abc import Iterator

from ..errors import InputError


# Tokenizer files have a few megabytes; the largest in use have half of this.
LARGEST = 64 * 2**20


@contextlib.contextmanager
def as_input_error(file: str | os.PathLike[str], complaint: str, remedy: str = "fetch it again") -> Iterator[None]:
    """Turns any exception of a library into an `InputError`.

    **Arguments:**

    - `file`: the file that the library reads.
    - `complaint`: the start of the message, with the file's name.
    - `remedy`: the end of the message.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # The exception of a Rust panic is not an `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        kind = "" if type(error).__name__ in ("Exception", "PanicException") else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())
        reason = reason if len(reason) <= 160 else f"{reason[:157]}..."
        raise InputError(f"{complaint} ({reason}); {remedy}.", file=file) from error
