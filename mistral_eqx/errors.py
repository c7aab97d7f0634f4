"""The exception for errors that a user can correct."""

import os


# Longer messages lose their middle: a damaged file may have names of megabytes.
_LONGEST = 1000


def one_line(text: str) -> str:
    """The text on one line that a terminal can show: control characters and unpaired surrogates are escaped."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 300]} ... {text[-295:]}"
    text = " ".join(text.split("\n"))
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


class InputError(ValueError):
    """An argument, an option or a file cannot be used. The message is one sentence that names it and the remedy.

    Any other exception from this package is a bug.

    **Attributes:**

    - `file`: the file or folder that is wrong, or `None`.
    - `key`: the argument, option, key or tensor that is wrong, by its name in the user's file or call, or `None`.
    - `remedy`: what to do, if the message does not say it already.
    """

    file: str | None
    key: str | None
    remedy: str | None

    def __init__(
        self,
        message: str,
        *,
        file: str | os.PathLike[str] | None = None,
        key: str | None = None,
        remedy: str | None = None,
    ):
        """**Arguments:**

        - `message`: what is wrong, with the value and its location; the whole sentence unless `remedy` is given.
        - `file`, `key`: see the attributes.
        - `remedy`: what to do; the message ends with it, after a semicolon.
        """
        super().__init__(one_line(message if remedy is None else f"{message.rstrip('.')}; {remedy.rstrip('.')}."))
        self.file = None if file is None else os.fspath(file)
        self.key = key
        self.remedy = remedy
