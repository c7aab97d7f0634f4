"""Ranges of a file's bytes, read one after the other into memory that is there already."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..errors import InputError


def read_ranges(path: Path, ranges: Iterable[tuple[int, int]], into: np.ndarray):
    """Fills a contiguous array with ranges of a file. Of the file nothing else is read.

    **Arguments:**

    - `path`: the file.
    - `ranges`: where each range begins, and its bytes; together as many as the array has.
    - `into`: the array.

    **Raises:** `ValueError` if the file ends before.
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
                    raise InputError(f"{str(path)!r} is truncated, it ended while it was read; fetch it again.")
                begin += count


def of_columns(offset: int, rows: int, row_bytes: int, columns: np.ndarray, width: int) -> Iterator[tuple[int, int]]:
    """The ranges that some columns of a matrix take up in a file, row by row.

    **Arguments:**

    - `offset`: where the first row begins.
    - `rows`: how many rows there are.
    - `row_bytes`: the bytes from one row to the next.
    - `columns`: which columns, ascending. Neighbours make one range.
    - `width`: the bytes of a column in a row.
    """
    spans = [(int(columns[start]) * width, (stop - start) * width) for start, stop in runs(columns)]
    for row in range(offset, offset + rows * row_bytes, row_bytes):
        for place, nbytes in spans:
            yield row + place, nbytes


def runs(numbers: np.ndarray, longest: int = sys.maxsize) -> Iterator[tuple[int, int]]:
    """Cuts ascending numbers into `start, stop` of consecutive ones, none longer than `longest`."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    for start, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(numbers)], strict=True):
        for cut in range(start, stop, longest):
            yield cut, min(cut + longest, stop)
