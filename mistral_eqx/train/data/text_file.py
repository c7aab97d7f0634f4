"""Documents in plain text files."""

import mmap
import re
from array import array
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ...errors import InputError
from .texts import AbstractTexts, Paths, Spans, files_of, fingerprint, one_kind_of_line_end, text_start


class TextFile(AbstractTexts):
    """Files of plain text in UTF-8. Lines may end with LF, CR LF or CR; a byte order mark is ignored."""

    def __init__(self, path: Paths, separator: str | None = None):
        r"""**Arguments:**

        - `path`: a file, or several.
        - `separator`: the text between documents, such as `"\n\n"`; blank documents are left out. Unless given, each
            file is one document.

        **Raises:** `ValueError` if a file does not exist, or no file has text.
        """
        if separator == "":
            raise InputError(
                "The separator is empty; give a text that separates documents, or None to make each file one document."
            )
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


def _pattern(separator: str) -> re.Pattern[bytes]:
    """Matches the separator with any line ends."""
    lines = one_kind_of_line_end(separator).encode().split(b"\n")
    return re.compile(rb"(?:\r\n|\r(?!\n)|\n)".join(map(re.escape, lines)))


def _bounds(file: Path, separator: str | None) -> Int[np.ndarray, "documents 2"]:
    size, start = file.stat().st_size, text_start(file)
    if size == start or separator is None:
        return np.asarray([[start, size]] if size > start else [], np.int64).reshape(-1, 2)
    bounds, pattern = array("q"), _pattern(separator)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while start < size:
            match = pattern.search(text, start)
            stop, after = match.span() if match else (size, size)
            if text[start:stop].strip():
                bounds.extend((start, stop))
            start = after
    return np.fromiter(bounds, np.int64, len(bounds)).reshape(-1, 2)
