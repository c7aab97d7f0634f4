"""Documents in files, read when they are needed."""

import abc
import codecs
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ...errors import InputError


# One file, or several, read in order.
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class AbstractTexts(abc.ABC):
    """Documents in files, each read when it is needed.

    To read another format, define the abstract methods.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of documents."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Any:
        """A document: its text, or the messages of a conversation. Several threads may call this at the same time.

        **Arguments:**

        - `index`: from 0 to `len(self) - 1`.
        """

    def where(self, index: int) -> str:
        """The name of a document in error messages: its file, and its line or row there."""
        return f"Row {index + 1}"

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes if the documents may have changed, so that cached tokens are made again."""


class Spans:
    """The bytes of documents in files, by an index of their start and stop: 16 bytes per document."""

    def __init__(self, files: Sequence[Path], bounds: Sequence[Int[np.ndarray, "documents 2"]]):
        """**Arguments:**

        - `files`: in order.
        - `bounds`: for each file, where each of its documents starts and stops.

        **Raises:** `ValueError` if there are no documents.
        """
        self.files = files
        self.bounds = bounds
        # The number of documents up to the end of each file.
        self.stops = np.cumsum([len(of_file) for of_file in bounds])
        if not self.stops[-1]:
            raise InputError(f"{_names(files)} holds no documents; give a file with text in it.")

    def __len__(self) -> int:
        return int(self.stops[-1])

    def read(self, index: int) -> tuple[Path, int, int, bytes]:
        """The file of a document, its number in this file (from 0), its first byte there, and its bytes."""
        file, number = locate(self.stops, index)
        start, stop = map(int, self.bounds[file][number])
        with self.files[file].open("rb") as opened:
            opened.seek(start)
            return self.files[file], number, start, opened.read(stop - start)


def text_start(file: Path) -> int:
    """The length of the byte order mark of a file, or 0 if it has none."""
    with file.open("rb") as opened:
        return len(codecs.BOM_UTF8) if opened.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0


def one_kind_of_line_end(text: str) -> str:
    """The text with LF for every line end."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def locate(stops: Int[np.ndarray, " groups"], index: int) -> tuple[int, int]:
    """The group of an entry and its number there, from the number of entries up to the end of each group."""
    if not 0 <= index < stops[-1]:
        raise IndexError(f"There is no entry {index} among {stops[-1]}.")
    group = int(np.searchsorted(stops, index, side="right"))
    return group, index - (int(stops[group - 1]) if group else 0)


def files_of(path: Paths) -> list[Path]:
    """The files of an argument; each of them exists."""
    files = [Path(file) for file in ([path] if isinstance(path, str | os.PathLike) else path)]
    if not files:
        raise InputError("There are no files to read texts from; give the path of one.")
    for file in files:
        if not file.is_file():
            raise InputError(f"There is no file {str(file)!r} to read texts from; check the path.")
    return files


def fingerprint(files: Sequence[Path], *how: str | None) -> str:
    """A digest of the names, sizes and modification times of files, and of how they are read."""
    status = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([how, status]).encode()).hexdigest()


def _names(files: Sequence[Path]) -> str:
    return repr(str(files[0])) if len(files) == 1 else f"None of {len(files)} files from {str(files[0])!r} on"
