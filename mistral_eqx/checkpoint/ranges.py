"""Reads byte ranges of a file into an existing array, and writes them from one."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..errors import InputError


def read_ranges(path: Path, ranges: Iterable[tuple[int, int]], into: np.ndarray):
    """Fills a contiguous array with byte ranges of a file, and reads no other bytes.

    **Arguments:**

    - `path`: the file.
    - `ranges`: the offset and the size of each range in bytes. The sum of the sizes is the size of the array.
    - `into`: the array.

    **Raises:** `ValueError` if the file is too short.
    """
    view = into.reshape(-1).view(np.uint8).data
    begin = 0
    with open(path, "rb", buffering=0) as file:
        for offset, nbytes in ranges:
            file.seek(offset)
            end = begin + nbytes
            while begin < end:
                count = file.readinto(view[begin:end])
                if not count:
                    raise InputError(f"{str(path)!r} is truncated: it ended while it was read; fetch it again.")
                begin += count


def write_ranges(path: Path, ranges: Iterable[tuple[int, int]], array: np.ndarray):
    """Writes a contiguous array to byte ranges of a file that exists: the inverse of `read_ranges`."""
    view = array.reshape(-1).view(np.uint8).data
    begin = 0
    # Opened for writing alone: for a file that is also open for reading, a network file system may read a page,
    # and later write all of it back, over what other hosts have written there.
    with open(path, "wb", buffering=0, opener=_existing) as file:
        for offset, nbytes in ranges:
            file.seek(offset)
            end = begin + nbytes
            while begin < end:
                begin += file.write(view[begin:end])


def _existing(path: str, flags: int) -> int:
    """Opens a file that must exist, and keeps its content."""
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC))


def of_columns(offset: int, rows: int, row_bytes: int, columns: np.ndarray, width: int) -> Iterator[tuple[int, int]]:
    """The byte ranges of selected columns of a matrix in a file, row by row.

    **Arguments:**

    - `offset`: the offset of the first row.
    - `rows`: the number of rows.
    - `row_bytes`: the size of a row.
    - `columns`: the selected columns, ascending. Adjacent columns make one range.
    - `width`: the bytes of a column in a row.
    """
    spans = [(int(columns[start]) * width, (stop - start) * width) for start, stop in runs(columns)]
    for row in range(offset, offset + rows * row_bytes, row_bytes):
        for start, nbytes in spans:
            yield row + start, nbytes


def runs(numbers: np.ndarray, longest: int = sys.maxsize) -> Iterator[tuple[int, int]]:
    """Splits ascending numbers into runs of consecutive numbers, given as `start, stop`, of at most `longest` each."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(numbers)], strict=True):
        for cut in range(start, stop, longest):
            yield cut, min(cut + longest, stop)
