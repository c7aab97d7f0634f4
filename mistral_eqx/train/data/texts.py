"""Texts that stay in their files until they are asked for."""

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


# One file, or several that are read one after the other.
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class AbstractTexts(abc.ABC):
    """Documents of files, each read when it is asked for.

    To read another format, define these three methods.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many documents there are."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Any:
        """A document: its text, or the messages of a conversation.

        **Arguments:**

        - `index`: from 0 to all but one. It may be called from several threads.
        """

    def where(self, index: int) -> str:
        """What a message calls a document: the file, and which line or row of it."""
        return f"Row {index + 1}"

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Another one if the documents may be others, so that what was made of them is made again."""


class Spans:
    """The bytes of documents in files, found by an index of where they start and stop: 16 bytes a document."""

    def __init__(self, files: Sequence[Path], bounds: Sequence[Int[np.ndarray, "documents 2"]]):
        """**Arguments:**

        - `files`: in order.
        - `bounds`: for each file, where each of its documents starts and stops.

        **Raises:** `ValueError` if there are no documents.
        """
        self.files = files
        self.bounds = bounds
        # How many documents there are up to and with each file.
        self.stops = np.cumsum([len(of_file) for of_file in bounds])
        if not self.stops[-1]:
            raise InputError(f"{_names(files)} holds no documents; give a file with text in it.")

    def __len__(self) -> int:
        return int(self.stops[-1])

    def read(self, index: int) -> tuple[Path, int, int, bytes]:
        """A document's file, which one of that file it is (from 0), where it starts there, and its bytes."""
        file, number = located(self.stops, index)
        start, stop = map(int, self.bounds[file][number])
        with self.files[file].open("rb") as opened:
            opened.seek(start)
            return self.files[file], number, start, opened.read(stop - start)


def text_start(file: Path) -> int:
    """How many bytes the byte order mark takes at a file's beginning, if it has one."""
    with file.open("rb") as opened:
        return len(codecs.BOM_UTF8) if opened.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0


def one_kind_of_line_end(text: str) -> str:
    """A text whose lines end as Python's do, whatever system wrote it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def located(stops: Int[np.ndarray, " parts"], index: int) -> tuple[int, int]:
    """In which part an entry is, and which one of it, if `stops` says how many there are up to and with each part."""
    if not 0 <= index < stops[-1]:
        raise IndexError(f"There is no entry {index} among {stops[-1]}.")
    part = int(np.searchsorted(stops, index, side="right"))
    return part, index - (int(stops[part - 1]) if part else 0)


def files_of(path: Paths) -> list[Path]:
    """The files of an argument, each of which is there."""
    files = [Path(file) for file in ([path] if isinstance(path, str | os.PathLike) else path)]
    if not files:
        raise InputError("There are no files to read texts from; give the path of one.")
    for file in files:
        if not file.is_file():
            raise InputError(f"There is no file {str(file)!r} to read texts from; check the path.")
    return files


def fingerprint(files: Sequence[Path], *how: str | None) -> str:
    """Of files by name, size and time of change, and of how they are read."""
    status = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([how, status]).encode()).hexdigest()


def _names(files: Sequence[Path]) -> str:
    return repr(str(files[0])) if len(files) == 1 else f"None of {len(files)} files from {str(files[0])!r} on"
