"""Rows that can be used, told from those that cannot before training begins."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from ...errors import InputError
from .texts import AbstractTexts


# What becomes of a row that cannot be used.
OnBadRow = Literal["refuse", "skip"]


class Usable:
    """The rows of texts that pass a check, which all go through once.

    **Attributes:**

    - `skipped`: a sentence for each row that is left out.
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

        - `texts`: of files, or a list.
        - `check`: is given each row; raises `InputError` for one that cannot be used.
        - `on_bad_row`: `"refuse"`, or `"skip"` to go on without it.
        - `progress`: called after each row with how many are done, and how many there are.

        **Raises:** `ValueError` that names the first row that cannot be used, or if none can.
        """
        self._texts = texts
        self.skipped = []
        kept: list[int] = []
        for number in range(len(texts)):
            try:
                use(texts, number, check)
                kept.append(number)
            except InputError as error:
                if on_bad_row == "refuse":
                    raise
                self.skipped.append(str(error))
            if progress is not None:
                progress(number + 1, len(texts))
        if not kept:
            reason = f", the first since: {self.skipped[0]}" if self.skipped else "."
            raise InputError(f"None of {len(texts)} rows can be used{reason}")
        self._kept: Int[np.ndarray, " rows"] = np.asarray(kept, np.int64)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Any:
        return self._texts[int(self._kept[index])]


def use(texts: AbstractTexts | Sequence[Any], number: int, how: Callable[[Any], Any]) -> Any:
    """What is made of a row.

    **Raises:** `InputError` that names the row.
    """
    where = texts.where(number) if isinstance(texts, AbstractTexts) else f"Row {number + 1}"
    try:
        return how(texts[number])
    except InputError as error:
        if where in str(error):
            raise
        raise InputError(f"{where} cannot be used: {error}", file=error.file, key=error.key) from error


def told(skipped: Sequence[str]) -> str:
    """How many rows were left out, and why the first one was."""
    return f"{len(skipped)} row{'s' if len(skipped) != 1 else ''} left out, the first since: {skipped[0]}"
