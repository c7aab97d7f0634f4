"""Writes what followed the prompts: for people on stdout, or as JSON, a line a prompt."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import InputError
from . import processes
from .continuing import Continuation, Likely
from .prompts import Prompt


Write: TypeAlias = Callable[[Prompt, Sequence[Continuation]], None]

# So much of a prompt stands in its heading.
_HEADING = 60


def readable(alone: bool) -> Write:
    """What writes texts to stdout, each under a heading as `head` and `tail` have it, with an empty line between.

    **Arguments:**

    - `alone`: whether there is one text only, which needs no heading.
    """
    first = True

    def write(prompt: Prompt, texts: Sequence[Continuation]):
        nonlocal first
        if all(text.finish is None and text.tokens == 0 for text in texts):
            return
        for number, text in enumerate(texts, 1):
            if not alone:
                lines = [] if first else [""]
                sys.stdout.write("\n".join([*lines, f"==> {_heading(prompt.text, number, texts)} <==\n"]))
            first = False
            sys.stdout.write(text.text + "\n")
            if text.logprobs is not None:
                sys.stdout.write("\n")
                for token in text.logprobs:
                    sys.stdout.write("\t".join([_shown(token), *map(_shown, token.top)]) + "\n")
        sys.stdout.flush()

    return write


def _heading(prompt: str, number: int, texts: Sequence[Continuation]) -> str:
    line = " ".join(prompt.split())
    line = line if len(line) <= _HEADING else line[: _HEADING - 3] + "..."
    score = texts[number - 1].score
    notes = [] if len(texts) == 1 else [f"{number} of {len(texts)}"]
    notes += [] if score is None else [f"score {score:.4f}"]
    return f"{line} ({', '.join(notes)})" if notes else line


def _shown(token: Likely) -> str:
    return f"{json.dumps(token.token, ensure_ascii=False)} {token.logprob:.4f}"


@contextlib.contextmanager
def json_lines(output: Path | None, overwrite: bool, several: bool) -> Iterator[Write]:
    """What writes an object a line: what stood on the prompt's, and the texts. Nothing is written of a prompt whose
    texts are not complete.

    A file gets its name when it is complete. Until then it has `.partial` behind it, and nothing but whole lines; so
    it stays if it does not come to an end.

    **Arguments:**

    - `output`: a file, or `None` for stdout.
    - `overwrite`: whether one that is there is replaced.
    - `several`: whether the texts of a prompt are a list, `samples`.
    """
    with contextlib.nullcontext() if output is None else _staged(output, overwrite) as file:

        def write(prompt: Prompt, texts: Sequence[Continuation]):
            if any(text.finish is None for text in texts):
                return
            found = [_fields(text) for text in texts]
            record = prompt.record | ({"samples": found} if several else found[0])
            if file is None:
                sys.stdout.write(_line(record, sys.stdout.encoding))
                sys.stdout.flush()
            else:
                file(_line(record, "utf-8").encode())

        yield write


def _fields(text: Continuation) -> dict[str, Any]:
    fields = {key: value for key, value in dataclasses.asdict(text).items() if value is not None}
    for token in fields.get("logprobs", ()):
        if not token["top"]:
            del token["top"]
    return fields


def _line(record: dict[str, Any], encoding: str) -> str:
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(record) + "\n"
    return line


def expect_output(output: Path, overwrite: bool):
    """Refuses a file that cannot be written.

    **Raises:** `ValueError` if its folder is not there, or something that may not be replaced is.
    """
    if not output.parent.is_dir():
        raise InputError(f"The folder of {str(output)!r} is not there; make it, or give another path.")
    for path in (output, _partial(output)):
        if path.exists() and not path.is_file():
            raise InputError(f"{str(path)!r} is no file that could be replaced; give another path.")
        if path.exists() and not overwrite:
            raise InputError(f"The file {str(path)!r} is there already; give another path, or add --overwrite.")


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


@contextlib.contextmanager
def _staged(output: Path, overwrite: bool) -> Iterator[Callable[[bytes], None]]:
    expect_output(output, overwrite)
    partial, lines, whole = _partial(output), 0, 0
    try:
        with open(partial, "wb", buffering=0) as file:

            def write(line: bytes):
                nonlocal lines, whole
                rest = memoryview(line)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except BaseException:  # the disk may be full in the middle of a line, and ctrl-C may come there
                    file.truncate(whole)
                    raise
                lines, whole = lines + 1, whole + len(line)

            yield write
    except BaseException:
        if lines:
            processes.say(f"The first {lines} lines are in {partial}.")
        else:
            partial.unlink(missing_ok=True)
        raise
    partial.replace(output)
