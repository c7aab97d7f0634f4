"""Finds the rows that cannot be used before training begins."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from ...errors import InputError
from .texts import AbstractTexts


# Whether a row that cannot be used raises or is skipped.
OnBadRow = Literal["refuse", "skip"]


class Usable:
    """The rows that pass a check. Every row is checked once, when this is made.

    **Attributes:**

    - `skipped`: a sentence for each row that was skipped.
    """

    skipped: list[str]

    def __init__(
        self,
        texts: AbstractTexts | Sequence[Any],
        check: Callable[[Any], object],
        *,
        on_bad_row: OnBadRow = "refuse",
        progress: Callable[[int, int], None] | None = None,
    ):
        """**Arguments:**

        - `texts`: documents in files, or a list.
        - `check`: called with each row; raises `InputError` if the row cannot be used.
        - `on_bad_row`: `"refuse"` raises at the first such row, `"skip"` continues without it.
        - `progress`: called after each row with the number of rows done, and of all rows.

        **Raises:** `ValueError` that names the row, if a row cannot be used; with `"skip"`, if no row can be used.
        """
        self._texts = texts
        self.skipped = []
        kept: list[int] = []
        for number in range(len(texts)):
            try:
                apply_to_row(texts, number, check)
                kept.append(number)
            except InputError as error:
                if on_bad_row == "refuse":
                    raise
                self.skipped.append(str(error))
            if progress is not None:
                progress(number + 1, len(texts))
        if not kept:
            reason = f"; the error of the first: {self.skipped[0]}" if self.skipped else "."
            raise InputError(f"None of {len(texts)} rows can be used{reason}")
        self._kept: Int[np.ndarray, " rows"] = np.asarray(kept, np.int64)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Any:
        return self._texts[int(self._kept[index])]


def apply_to_row(texts: AbstractTexts | Sequence[Any], number: int, fn: Callable[[Any], Any]) -> Any:
    """`fn` of a row.

    **Raises:** `InputError` that names the row.
    """
    where = texts.where(number) if isinstance(texts, AbstractTexts) else f"Row {number + 1}"
    try:
        return fn(texts[number])
    except InputError as error:
        if where in str(error):
            raise
        raise InputError(f"{where} cannot be used: {error}", file=error.file, key=error.key) from error


def describe_skipped(skipped: Sequence[str]) -> str:
    """A sentence with the number of skipped rows, and the error of the first one."""
    return f"{len(skipped)} row{'s' if len(skipped) != 1 else ''} skipped; the error of the first: {skipped[0]}"
