"""Reads whole files of text, JSON and TOML, with limits on size and depth."""

import json
import math
import os
import stat
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError


MiB = 2**20
# Real config files have at most four levels. Recursion over this many levels stays far from Python's limit.
DEEPEST = 64

Value = TypeVar("Value")


def read_bytes(path: str | os.PathLike[str], limit: int = 16 * MiB) -> bytes:
    """Reads a regular file whole.

    **Arguments:**

    - `path`: the file, or a link to it.
    - `limit`: the most bytes that it may have.

    **Returns:** its bytes.

    **Raises:** `InputError` if `path` is a folder, a pipe or a device, or is larger than `limit`; `OSError` if it
    cannot be read.
    """
    path = Path(path)
    expect_regular(path)
    with open(path, "rb") as file:
        # `read` allocates its argument at once, so ask for the file's reported size; some special files report 0.
        content = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
        while len(content) <= limit and (more := file.read(MiB)):
            content += more
    if len(content) > limit:
        size = f"{limit // MiB} MB" if limit >= MiB else f"{limit} bytes"
        raise InputError(
            f"{str(path)!r} is larger than {size}, the limit for a file of its kind; fetch it again.", file=path
        )
    return content


def to_path(name: str | os.PathLike[str], what: str, remedy: str = "give another path") -> Path:
    """The path that a user gave, with the home folder in place of `~`.

    **Arguments:**

    - `name`: the path.
    - `what`: the description of the path in messages, such as `"The name of the model"`.
    - `remedy`: the remedy in messages.

    **Raises:** `InputError` if `name` is not a path, is empty, has a null byte or an unpaired surrogate, or names a
    user that does not exist.
    """
    try:
        text = os.fspath(name)
        if not isinstance(text, str):
            raise TypeError
    except TypeError as error:
        raise InputError(f"{what} is {shown(name)}, which is not a path; {remedy}.") from error
    if not text:
        raise InputError(f"{what} is empty; {remedy}.")
    if "\0" in text:
        raise InputError(f"{what} is {shown(text)}, and no path has a null byte; {remedy}.")
    try:
        os.fsencode(text)
        return Path(text).expanduser()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is {shown(text)}, which has half of a character; {remedy}.") from error
    except RuntimeError as error:
        raise InputError(
            f"{what} is {shown(text)}, but there is no user {shown(Path(text).parts[0])} with a home; {remedy}."
        ) from error


def expect_regular(path: Path):
    """Refuses a path that is not a regular file, and so may have no end or block the reader.

    **Raises:** `InputError` if `path` is a folder, a pipe, a socket or a device; `OSError` if nothing is there.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise InputError(f"{str(path)!r} is {kind}, not a file; replace it by the file.", file=path)


def read_text(path: str | os.PathLike[str], limit: int = 16 * MiB) -> str:
    """Reads a file of UTF-8 text whole; a byte order mark at its beginning is dropped.

    **Raises:** `InputError` as `read_bytes`, and if the file is not UTF-8.
    """
    return decoded(read_bytes(path, limit), path)


def decoded(content: bytes, path: str | os.PathLike[str]) -> str:
    """Decodes UTF-8; a byte order mark at the beginning is dropped.

    **Raises:** `InputError` that names `path` and the position, if the bytes are not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}; convert it, for example with "
            "iconv -t UTF-8.",
            file=path,
        ) from error


def read_json(path: str | os.PathLike[str], limit: int = 16 * MiB) -> dict[str, Any]:
    """Reads a JSON object from a file.

    **Raises:** `InputError` that names the file, if it is not a JSON object, or nests deeper than `DEEPEST` levels.
    """
    content = parse_json(read_text(path, limit), repr(str(path)), file=path)
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} must hold a JSON object, not {_kind_of(content)}; fetch it again.", file=path)
    return content


def parse_json(text: str | bytes, name: str, *, file: str | os.PathLike[str] | None = None, remedy: str = "") -> Any:
    """Parses standard JSON: no NaN, no Infinity, and no key twice in an object.

    **Arguments:**

    - `text`: the JSON.
    - `name`: the name of the file or line in messages.
    - `file`: the file of the error.
    - `remedy`: the remedy in messages; to fetch the file again unless given.

    **Raises:** `InputError` if the text is not JSON, has a number that is not finite, or nests deeper than `DEEPEST`
    levels.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise ValueError(f"the number {shown(digits, 20)} is too large")
        return number

    def parse() -> Any:
        return json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=_without_duplicates)

    return _parsed(parse, name, "JSON", file, remedy or "fetch it again")


def read_toml(path: str | os.PathLike[str], limit: int = MiB) -> dict[str, Any]:
    """Reads a TOML document from a file.

    **Raises:** `InputError` that names the file, if it is not TOML, or nests deeper than `DEEPEST` levels.
    """
    text = read_text(path, limit)
    return _parsed(lambda: tomllib.loads(text), repr(str(path)), "TOML", path, "correct it there")


def _parsed(
    parse: Callable[[], Value], name: str, kind: str, file: str | os.PathLike[str] | None, remedy: str
) -> Value:
    try:
        content = parse()
        if depth(content) <= DEEPEST:
            return content
        reason = f"it nests deeper than {DEEPEST} levels"
    except RecursionError:
        reason = f"it nests deeper than {DEEPEST} levels"
    except ValueError as error:
        reason = _shortened(str(error))
    raise InputError(f"{name} is not valid {kind} ({reason}); {remedy}.", file=file)


def depth(content: Any) -> int:
    """The depth of nested lists and objects, counted without recursion."""
    levels, level = 0, [content]
    while level and levels <= DEEPEST:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        nested = [value for value in inner if isinstance(value, dict | list)]
        levels += any(isinstance(value, dict | list) for value in level)
        level = nested
    return levels


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {shown(key)} appears twice")
        content[key] = value
    return content


def shown(value: object, most: int = 80) -> str:
    """The value for a message: printable, on one line, with at most `most` characters."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list that holds itself
        text = f"a very large {type(value).__name__}"
    if "\n" in text:  # an array, of which each row has a line
        text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _shortened(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."


def _kind_of(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
