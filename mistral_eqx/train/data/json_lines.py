"""Documents in JSON Lines files."""

import mmap
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ...documents import parse_json, shown
from ...errors import InputError
from .texts import AbstractTexts, Paths, Spans, files_of, fingerprint, text_start


_LINE_END = re.compile(rb"\r\n|\r|\n")


class JSONLines(AbstractTexts):
    """Files in UTF-8 in which each line is a JSON object. Lines may end with LF, CR LF or CR."""

    def __init__(self, path: Paths, field: str = "text"):
        """**Arguments:**

        - `path`: a file, or several.
        - `field`: the field with the text, or with a list of messages, each with `"role"` and `"content"`.

        **Raises:** `ValueError` if a file does not exist, or no file has a line. An invalid line raises when it is
        read.
        """
        self.files = files_of(path)
        self.field = field
        self._spans = Spans(self.files, [_bounds(file) for file in self.files])

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str | list[dict[str, Any]]:
        file, number, _, content = self._spans.read(index)
        line = f"Line {number + 1} of {str(file)!r}"
        try:
            record = parse_json(content.decode(), line, file=file, remedy="correct it")
        except UnicodeDecodeError as error:
            raise InputError(f"{line} is not UTF-8; convert the file, for example with iconv.") from error
        if not isinstance(record, dict):
            raise InputError(f"{line} is not a JSON object but a {type(record).__name__}; write one object per line.")
        if self.field not in record:
            names = ", ".join(shown(name) for name in list(record)[:5]) or "nothing"
            raise InputError(
                f"{line} has no field {self.field!r}, but {names}; give the name of the field with the text."
            )
        return document(record[self.field], f"{line}, field {self.field!r},")

    def where(self, index: int) -> str:
        file, number, _, _ = self._spans.read(index)
        return f"Line {number + 1} of {str(file)!r}"

    def fingerprint(self) -> str:
        return fingerprint(self.files, "json lines", self.field)


def document(value: object, where: str) -> str | list[dict[str, Any]]:
    """Checks that a value is a text or a list of messages, and returns it."""
    if isinstance(value, str):
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    ):
        return value
    raise InputError(f"{where} is neither a text nor a list of messages with 'role' and 'content'; leave it out.")


def _bounds(file: Path) -> Int[np.ndarray, "documents 2"]:
    start, size = text_start(file), file.stat().st_size
    if size == start:
        return np.zeros((0, 2), np.int64)
    starts, last = array("q", [start]), 0
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for end in _LINE_END.finditer(text, start):
            starts.append(end.end())
            # Blank lines at the end are not documents.
            last = len(starts) - 1 if text[starts[-2] : end.start()].strip() else last
        if text[starts[-1] :].strip():
            starts.append(size)
            last = len(starts) - 1
    ends = np.fromiter(starts, np.int64, last + 1)
    return np.stack([ends[:-1], ends[1:]], axis=1)
