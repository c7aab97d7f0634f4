"""Documents of plain text."""

import mmap
import re
from array import array
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ...errors import InputError
from .texts import AbstractTexts, Paths, Spans, files_of, fingerprint, one_kind_of_line_end, text_start


class TextFile(AbstractTexts):
    """Files of plain text in UTF-8. Lines may end as on any system; a byte order mark is no text."""

    def __init__(self, path: Paths, separator: str | None = None):
        r"""**Arguments:**

        - `path`: a file, or several.
        - `separator`: what stands between documents, such as `"\n\n"`; a document without letters is left out. Unless
            given, each file is one document.

        **Raises:** `ValueError` if a file is not there, or none has text.
        """
        if separator == "":
            raise InputError("Nothing cannot stand between documents; give a separator, or None for whole files.")
        self.files = files_of(path)
        self.separator = separator
        self._spans = Spans(self.files, [_bounds(file, separator) for file in self.files])

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        file, _, start, content = self._spans.read(index)
        try:
            return one_kind_of_line_end(content.decode())
        except UnicodeDecodeError as error:
            raise InputError(
                f"{str(file)!r} is not UTF-8 from byte {start + error.start} on; convert it, for example with iconv."
            ) from error

    def where(self, index: int) -> str:
        file, number, _, _ = self._spans.read(index)
        return f"Document {number + 1} of {str(file)!r}"

    def fingerprint(self) -> str:
        return fingerprint(self.files, "text", self.separator)


def _mark(separator: str) -> re.Pattern[bytes]:
    """Finds a separator, each of whose line ends may be of any kind."""
    lines = one_kind_of_line_end(separator).encode().split(b"\n")
    return re.compile(rb"(?:\r\n|\r(?!\n)|\n)".join(map(re.escape, lines)))


def _bounds(file: Path, separator: str | None) -> Int[np.ndarray, "documents 2"]:
    size, start = file.stat().st_size, text_start(file)
    if size == start or separator is None:
        return np.asarray([[start, size]] if size > start else [], np.int64).reshape(-1, 2)
    found, mark, start = array("q"), _mark(separator), start
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while start < size:
            match = mark.search(text, start)
            stop, after = match.span() if match else (size, size)
            if text[start:stop].strip():
                found.extend((start, stop))
            start = after
    return np.fromiter(found, np.int64, len(found)).reshape(-1, 2)
