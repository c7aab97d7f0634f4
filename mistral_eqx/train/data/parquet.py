"""Documents in a column of Parquet files."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from .json_lines import document
from .texts import AbstractTexts, Paths, files_of, fingerprint, locate


class Parquet(AbstractTexts):
    """Parquet files. It needs the extra `parquet`.

    To read a row, it reads the whole row group, and keeps the last group in memory: reading in order is fast, random
    access is slow. [`mistral_eqx.train.data.tokenise`][] reads the rows once, in order.
    """

    def __init__(self, path: Paths, column: str = "text"):
        """**Arguments:**

        - `path`: a file, or several.
        - `column`: the column with the text, or with lists of messages, each with `"role"` and `"content"`.

        **Raises:** `ValueError` if pyarrow is not installed, a file does not exist, is not a Parquet file or lacks the
        column, or there are no rows.
        """
        self.files = files_of(path)
        self.column = column
        if importlib.util.find_spec("pyarrow") is None:
            raise InputError(
                f"Reading {str(self.files[0])!r} needs the extra `parquet`: pip install 'mistral-eqx[parquet]'."
            )
        # The file of each row group, and the index of the group in this file.
        self._groups: list[tuple[Path, int]] = []
        counts: list[int] = []
        for file in self.files:
            found = _row_groups(file, column)
            self._groups += [(file, number) for number in range(len(found))]
            counts += found
        self._stops = np.cumsum(counts, dtype=np.int64)
        if not sum(counts):
            raise InputError(f"{str(self.files[0])!r} holds no rows; give a file with text in it.")
        # One assignment replaces the pair, so that threads need no lock.
        self._last: tuple[int, Any] = -1, None

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: int) -> str | list[dict[str, Any]]:
        group, row = locate(self._stops, index)
        last_group, values = self._last
        if last_group != group:
            import pyarrow
            import pyarrow.parquet

            file, number = self._groups[group]
            try:
                with pyarrow.parquet.ParquetFile(file) as opened:
                    values = opened.read_row_group(number, columns=[self.column])[self.column]
            except (pyarrow.ArrowException, OSError) as error:
                raise _damaged(file) from error
            self._last = group, values
        return document(values[row].as_py(), f"{self.where(index)}, column {self.column!r},")

    def where(self, index: int) -> str:
        group, _ = locate(self._stops, index)
        file = self._groups[group][0]
        first = next(number for number, (other, _) in enumerate(self._groups) if other == file)
        before = int(self._stops[first - 1]) if first else 0
        return f"Row {index - before + 1} of {str(file)!r}"

    def fingerprint(self) -> str:
        return fingerprint(self.files, "parquet", self.column)


def _damaged(file: Path) -> InputError:
    return InputError(f"{str(file)!r} is not a Parquet file, or it is damaged; download it again.", file=file)


def _row_groups(file: Path, column: str) -> list[int]:
    """The number of rows of each row group."""
    import pyarrow
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file) from error
    with opened:
        names = opened.schema_arrow.names
        if column not in names:
            raise InputError(
                f"{str(file)!r} has no column {column!r}, but {', '.join(map(repr, names[:5]))}; give the name of "
                "the column with the text."
            )
        return [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
