"""Documents that are a line of JSON each."""

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ...errors import InputError
from .texts import AbstractTexts, Paths, Spans, files_of, fingerprint


class JSONLines(AbstractTexts):
    """Files in which each line is an object of JSON, in UTF-8."""

    def __init__(self, path: Paths, field: str = "text"):
        """**Arguments:**

        - `path`: a file, or several.
        - `field`: where an object has its text, or its list of messages, each with `"role"` and `"content"`.

        **Raises:** `ValueError` if a file is not there, or none has lines. What is wrong with a line is said when it is
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
            record = json.loads(content.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"{line} is not UTF-8; convert the file, for example with iconv.") from error
        except json.JSONDecodeError as error:
            raise InputError(f"{line} is no JSON ({error.msg} at column {error.colno}); correct it.") from error
        if not isinstance(record, dict):
            raise InputError(f"{line} is no object of JSON but a {type(record).__name__}; write one a line.")
        if self.field not in record:
            names = ", ".join(map(repr, list(record)[:5])) or "nothing"
            raise InputError(f"{line} has no field {self.field!r}, but {names}; name the one with the text.")
        return document(record[self.field], f"{line}, field {self.field!r},")

    def fingerprint(self) -> str:
        return fingerprint(self.files, "json lines", self.field)


def document(value: object, where: str) -> str | list[dict[str, Any]]:
    """What a record has, if it is a text or a conversation."""
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
    stops, stop, last = array("q"), 0, 0
    with file.open("rb") as opened:
        for line in opened:
            stop += len(line)
            stops.append(stop)
            # Blank lines at the end are no documents.
            last = len(stops) if line.strip() else last
    ends = np.fromiter(stops, np.int64, last)
    return np.stack([np.concatenate([[0], ends])[:-1], ends], axis=1)
