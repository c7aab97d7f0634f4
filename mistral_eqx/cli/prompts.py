"""Prompts from the command line, from stdin, and from files with one JSON value a line."""

import contextlib
import dataclasses
import itertools
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError


# How a file of prompts is to be written, at the end of sentences about one that is not.
_REMEDY = 'write {"prompt": "..."} on each line, or a text as a JSON string'


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue.

    **Attributes:**

    - `number`: the how many-th it is, from 0: it draws the same whatever batch it is in.
    - `text`: what the user wrote.
    - `ids`: its tokens.
    - `record`: what stands on its line of a file.
    """

    number: int
    text: str
    ids: list[int]
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_texts(arguments: Sequence[str]) -> list[str]:
    """The texts of the command line, of which '-' is read from stdin, and so is the one text if there is none.

    **Raises:** `ValueError` if one is empty, or is no text.
    """
    if not arguments and sys.stdin.isatty():
        raise InputError("There is no prompt; give one as an argument, or pipe it in.")
    texts = [_read_stdin() if argument == "-" else argument for argument in arguments or ["-"]]
    for number, text in enumerate(texts, 1):
        if not text:
            which = "The prompt" if len(texts) == 1 else f"Prompt {number}"
            raise InputError(f"{which} is empty; give some text to continue.")
    return texts


def _read_stdin() -> str:
    try:
        # The newline at the end is the pipe's or the editor's, hardly ever meant.
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"The prompt on stdin is not {error.encoding.upper()} text: {error.reason}.") from error


def encode_texts(texts: Sequence[str], encode: Callable[[str], list[int]]) -> list[Prompt]:
    """Prompts from texts.

    **Arguments:**

    - `encode`: makes tokens, or raises a `ValueError`, which is then told with the prompt's number.
    """
    alone = len(texts) == 1
    return [
        Prompt(number, text, _encoded(text, encode, None if alone else f"Prompt {number + 1}"))
        for number, text in enumerate(texts)
    ]


def read_file(path: str, encode: Callable[[str], list[int]]) -> Iterator[Prompt]:
    """The prompts of a file, line by line; lines without anything are passed over.

    **Arguments:**

    - `path`: the file, or '-' for stdin.
    - `encode`: makes tokens, or raises a `ValueError`, which is then told with the line's number.

    **Raises:** `ValueError` that names the line if it is no JSON or has no text to continue; if there is no prompt at
    all.
    """
    name = "stdin" if path == "-" else repr(path)
    number = 0
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as lines:
        for at, line in enumerate(lines, 1):
            if line.strip():
                where = f"Line {at} of {name}"
                record = _record(line, where)
                yield Prompt(number, record["prompt"], _encoded(record["prompt"], encode, where), record)
                number += 1
    if number == 0:
        raise InputError(f"There is no prompt in {name}; {_REMEDY}.")


def expect_file(path: str):
    """Refuses what is no file of prompts, without reading it.

    **Raises:** `OSError` if nothing is there, `ValueError` if it is a folder.
    """
    if path != "-" and stat.S_ISDIR(os.stat(path).st_mode):
        raise InputError(f"{path!r} is a folder; give a file of prompts.")


def count_file(path: str, encode: Callable[[str], list[int]]) -> int | None:
    """How many prompts a file has, all of which are checked; `None` if it can be read only once, as a pipe.

    **Raises:** as `read_file`.
    """
    if path == "-" or (Path(path).exists() and not Path(path).is_file()):
        return None
    return sum(1 for _ in read_file(path, encode))


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON; {_REMEDY}.") from error
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict) or "prompt" not in record:
        raise InputError(f'{where} has no "prompt"; {_REMEDY}.')
    if not isinstance(record["prompt"], str):
        raise InputError(f'{where} has a "prompt" that is no string; {_REMEDY}.')
    if not record["prompt"]:
        raise InputError(f"{where} has an empty prompt; give some text to continue.")
    return record


def _encoded(text: str, encode: Callable[[str], list[int]], where: str | None) -> list[int]:
    try:
        return encode(text)
    except ValueError as error:
        if where is None:
            raise
        raise InputError(f"{where}: {error}") from error


def in_batches(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    """The prompts, `size` at a time."""
    prompts = iter(prompts)
    while batch := list(itertools.islice(prompts, size)):
        yield batch


def share_batches(batches: Iterable[list[Prompt]] | None) -> Iterator[list[Prompt]]:
    """The batches of process 0, on all processes, each when it is wanted; the others get what they need to decode.

    **Arguments:**

    - `batches`: `None` on the other processes.
    """
    from ..parallel.agreement import share

    if batches is None:
        while (text := share(None)) is not None:
            yield [Prompt(number, "", ids) for number, ids in json.loads(text)]
        return
    for batch in batches:
        share(json.dumps([(prompt.number, prompt.ids) for prompt in batch]))
        yield batch
    share(None)
