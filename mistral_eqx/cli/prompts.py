"""Prompts from the command line, from stdin, and from files with one JSON value a line."""

import codecs
import contextlib
import dataclasses
import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..documents import MiB, parse_json, shown
from ..errors import InputError


# The most bytes of a line, and of a text on stdin; no model has so long a context.
_LONGEST = 16 * MiB
_DECODER = json.JSONDecoder()
# What may stand before a key or a value of an object.
_JSON_SPACE: Any = re.compile(r"[\s,:]*")
# How a file of prompts is to be written, at the end of sentences about one that is not.
_REMEDY = 'write {"prompt": "..."} or {"messages": [...]} on each line, or a text as a JSON string'


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue.

    **Attributes:**

    - `number`: its index, from 0, which seeds its random numbers, whatever batch it is in.
    - `text`: what the user wrote; of a conversation, its last message.
    - `ids`: its tokens.
    - `record`: the values of the object on its line of a file, each as the JSON that stands there.
    """

    number: int
    text: str
    ids: list[int]
    record: dict[str, str] = dataclasses.field(default_factory=dict)


def read_texts(arguments: Sequence[str]) -> list[str]:
    """The texts of the command line; '-', or no text at all, reads one from stdin.

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
        text = sys.stdin.read(_LONGEST + 1)
        text.encode()  # without an encoding in the locale, bytes that are not UTF-8 become surrogates
    except UnicodeError as error:
        raise InputError(f"The prompt on stdin is not UTF-8 text ({error}); convert it.") from error
    if len(text) > _LONGEST:
        raise InputError(f"The prompt on stdin is longer than {_LONGEST // MiB} MB; give a shorter one.")
    # The last newline usually comes from the pipe or the editor.
    return text.removesuffix("\n")


def encode_texts(texts: Sequence[str], encode: Callable[[str], list[int]]) -> list[Prompt]:
    """Prompts from texts.

    **Arguments:**

    - `encode`: makes tokens, or raises a `ValueError`, to which the prompt's number is added.
    """
    alone = len(texts) == 1
    return [
        Prompt(number, text, _encoded(text, encode, None if alone else f"Prompt {number + 1}"))
        for number, text in enumerate(texts)
    ]


def read_file(path: str, encode: Callable[[Any], list[int]]) -> Iterator[Prompt]:
    """The prompts of a file, line by line; empty lines are skipped.

    **Arguments:**

    - `path`: the file, or '-' for stdin.
    - `encode`: makes tokens of a text or of messages, or raises a `ValueError`, to which the line's number is added.

    **Raises:** `ValueError` that names the line if it is no JSON or has no text to continue; if there is no prompt at
    all.
    """
    name = "stdin" if path == "-" else repr(path)
    number = 0
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        for at, line in enumerate(_lines(file.readline, name), 1):
            where = f"Line {at} of {name}"
            if line.strip():
                record = _record(line, where, None if path == "-" else path)
                ids = _encoded(record.get("messages", record.get("prompt")), encode, where)
                yield Prompt(number, _text(record), ids, _kept(line, record))
                number += 1
    if number == 0:
        raise InputError(f"There is no prompt in {name}; {_REMEDY}.", file=None if path == "-" else path)


def _lines(readline: Callable[[int], bytes], name: str) -> Iterator[bytes]:
    """The lines of a file with any line ending, without a byte order mark."""
    at = 0
    while line := readline(_LONGEST + 1):
        if len(line) > _LONGEST:
            raise InputError(f"Line {at + 1} of {name} is longer than {_LONGEST // MiB} MB; {_REMEDY}.")
        if at == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        # JSON has no carriage return within a value.
        for part in line.splitlines():
            at += 1
            yield part


def expect_file(path: str):
    """Checks a file of prompts without reading it.

    **Raises:** `OSError` if it does not exist, `ValueError` if it is a folder.
    """
    if not path:
        raise InputError("--prompts is ''; give a file of prompts, or '-' for stdin.", key="prompts")
    if path != "-" and stat.S_ISDIR(os.stat(path).st_mode):
        raise InputError(f"{path!r} is a folder; give a file of prompts.")


def count_file(path: str, encode: Callable[[Any], list[int]]) -> int | None:
    """Checks and counts the prompts of a file; `None` if it can be read only once, such as a pipe.

    **Raises:** as `read_file`.
    """
    if path == "-" or (Path(path).exists() and not Path(path).is_file()):
        return None
    return sum(1 for _ in read_file(path, encode))


def _record(line: bytes, where: str, file: str | None) -> dict[str, Any]:
    def wrong(what: str, remedy: str = _REMEDY) -> InputError:
        return InputError(f"{where} {what}; {remedy}.", file=file)

    try:
        record = parse_json(line.decode(), where, file=file, remedy=_REMEDY)
    except UnicodeDecodeError as error:
        raise wrong(f"is not valid JSON (it is not UTF-8: {error.reason} at byte {error.start})") from error
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict) or not record.keys() & {"prompt", "messages"}:
        raise wrong('has no "prompt"')
    if "messages" in record:
        if "prompt" in record:
            raise wrong('has a "prompt" and "messages"', "keep one of the two")
        messages = record["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise wrong(f'has the "messages" {shown(messages)}, which are not a list of objects')
        text = json.dumps(messages, ensure_ascii=False)
    else:
        text = record["prompt"]
    if not isinstance(text, str):
        raise wrong(f'has the "prompt" {shown(text)}, which is no string')
    if not text:
        raise wrong("has an empty prompt", "give some text to continue")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise wrong("has half of a character (a surrogate without its pair)") from error
    return record


def _text(record: dict[str, Any]) -> str:
    """What stands for a line in a heading."""
    return record["prompt"] if "prompt" in record else str(record["messages"][-1].get("content", ""))


def _kept(line: bytes, record: dict[str, Any]) -> dict[str, str]:
    """The values of a line's object as JSON text, unchanged: a number keeps its digits."""
    text = line.decode()
    if not text.lstrip().startswith("{"):
        return {key: json.dumps(value, ensure_ascii=False) for key, value in record.items()}
    kept, at = {}, text.index("{") + 1
    for _ in record:
        key, at = _DECODER.raw_decode(text, _JSON_SPACE.match(text, at).end())
        start = _JSON_SPACE.match(text, at).end()
        _, at = _DECODER.raw_decode(text, start)
        kept[key] = text[start:at]
    return kept


def _encoded(content: Any, encode: Callable[[Any], list[int]], where: str | None) -> list[int]:
    try:
        return encode(content)
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
    """Yields the batches of process 0 on all processes; the others get only what they need to decode.

    **Arguments:**

    - `batches`: `None` on the other processes.
    """
    from ..parallel.agreement import broadcast

    if batches is None:
        while (text := broadcast(None)) is not None:
            yield [Prompt(number, "", ids) for number, ids in json.loads(text)]
        return
    for batch in batches:
        broadcast(json.dumps([(prompt.number, prompt.ids) for prompt in batch]))
        yield batch
    broadcast(None)
