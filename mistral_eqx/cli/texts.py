"""Writes what followed the prompts: for people on stdout, or as JSON, a line a prompt."""

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

from ..errors import InputError
from ..locks import try_lock
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
                rows = ["\t".join([_shown(token), *map(_shown, token.top)]) + "\n" for token in text.logprobs]
                sys.stdout.write("\n" + "".join(rows))
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
            fields = {"samples": found} if several else found[0]
            record = prompt.record | {key: _json(value) for key, value in fields.items()}
            if file is None:
                sys.stdout.write(_line(record, sys.stdout.encoding))
                sys.stdout.flush()
            else:
                file(_line(record, "utf-8").encode())

        yield write


def _fields(text: Continuation) -> dict[str, Any]:
    fields = {key: _number(value) for key, value in dataclasses.asdict(text).items() if value is not None}
    for token in fields.get("logprobs", ()):
        for likely in (token, *token["top"]):
            likely["logprob"] = _number(likely["logprob"])
        if not token["top"]:
            del token["top"]
    return fields


def _number(value: Any) -> Any:
    """JSON has no infinity; the logarithm of a probability of 0 is null there."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _line(record: dict[str, str], encoding: str) -> str:
    """A line with an object of values that are JSON already."""
    line = "{" + ", ".join(f"{_json(key)}: {value}" for key, value in record.items()) + "}\n"
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(json.loads(line)) + "\n"
    return line


def expect_output(output: Path, overwrite: bool, prompts: str, model: Path):
    """Refuses a file that cannot be written, or whose writing would destroy what is read.

    **Arguments:**

    - `prompts`: the file that is read, or `'-'`.
    - `model`: the folder or file of the model.

    **Raises:** `ValueError` if its folder is not there, something that may not be replaced is, or another command
    writes it.
    """
    if not output.name or not output.parent.is_dir():
        raise InputError(f"The folder of {str(output)!r} is not there; make it, or give another path.", file=output)
    partial = _partial(output)
    for path in (output, partial):
        try:
            path.lstat()
        except FileNotFoundError:
            continue
        if not path.is_file():
            raise InputError(f"{str(path)!r} is no file that could be replaced; give another path.", file=path)
        if not overwrite:
            raise InputError(
                f"The file {str(path)!r} is there already; give another path, or add --overwrite.", file=path
            )
        if any(os.path.samefile(path, file) for file in _files(model)):
            raise InputError(f"{str(path)!r} is a file of the model; give another path of --output.", file=path)
    if partial.exists():
        # The output itself may be the prompts' file, which is replaced when all of it was read.
        if prompts != "-" and os.path.exists(prompts) and os.path.samefile(partial, prompts):
            raise InputError(
                f"{str(partial)!r} is the file of --prompts and is where --output {str(output)!r} is written "
                "until it is complete; give another path.",
                file=partial,
            )
        with open(partial, "rb") as file:
            _expect_lock(file, partial)


def _files(model: Path) -> list[Path]:
    return [file for file in model.iterdir() if file.is_file()] if model.is_dir() else [model]


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _expect_lock(file: IO[bytes], partial: Path):
    if not try_lock(file):
        raise InputError(
            f"Another command is writing {str(partial)!r}; wait for it, or give another path of --output.",
            file=partial,
        )


@contextlib.contextmanager
def _staged(output: Path, overwrite: bool) -> Iterator[Callable[[bytes], None]]:
    partial, lines, whole = _partial(output), 0, 0
    mode = os.O_RDWR | os.O_CREAT | (0 if overwrite else os.O_EXCL) | getattr(os, "O_BINARY", 0)
    with open(partial, "r+b", buffering=0, opener=lambda path, _: os.open(path, mode, 0o666)) as file:
        _expect_lock(file, partial)
        if not os.path.samestat(os.fstat(file.fileno()), partial.stat()):
            # The one that wrote it has given it its name meanwhile.
            raise InputError(f"Another command has just written {str(output)!r}; give another path.", file=output)
        file.truncate(0)

        def write(line: bytes):
            nonlocal lines, whole
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException as error:  # the disk may be full in the middle of a line, and ctrl-C may come there
                file.truncate(whole)
                file.seek(whole)
                if isinstance(error, OSError):
                    raise OSError(error.errno, error.strerror, str(partial)) from error
                raise
            lines, whole = lines + 1, whole + len(line)

        try:
            yield write
        except BaseException:
            if lines:
                processes.say(f"The first {lines} lines are in {partial}.")
            else:
                partial.unlink(missing_ok=True)
            raise
        if sys.platform == "win32":
            file.close()  # which has no other name for a file that is open
        partial.replace(output)
