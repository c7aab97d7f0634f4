"""Stop strings, and what generation needs of a tokenizer to find them."""

from collections.abc import Iterable, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from ..errors import InputError
from .prompt import Encoder


@runtime_checkable
class Stops(Protocol):
    """The stop strings found in the rows of a batch.

    **Attributes:**

    - `lengths`: for each row the number of tokens up to the one that completed a stop string, or -1.
    - `texts`: the text of each row that is certain so far.
    """

    lengths: Int[np.ndarray, " rows"]
    texts: list[str]

    def read(self, tokens: Int[np.ndarray, "rows new"], lengths: Int[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
        """Reads all tokens so far, and returns which rows have stopped."""
        ...

    def flush(self) -> list[str]:
        """Ends all texts, and returns them."""
        ...


@runtime_checkable
class Tokenizer(Encoder, Protocol):
    """A tokenizer, as generation sees it."""

    def decode(
        self, ids: Iterable[SupportsIndex], *, skip_special: bool = True, after: Sequence[SupportsIndex] = ()
    ) -> str:
        """Decodes token ids that continue others."""
        ...

    def find_stops(self, stop: str | Sequence[str], after: Sequence[Sequence[SupportsIndex]]) -> Stops:
        """Watches for stop strings in rows that continue these ids."""
        ...


def stop_rows(
    stop: str | Sequence[str], tokenizer: Tokenizer | None, after: Sequence[Sequence[SupportsIndex]]
) -> Stops | None:
    """Watches for stop strings in rows that continue these ids; `None` if there are no stop strings.

    **Raises:** `ValueError` if one is empty, or there is no tokenizer.
    """
    if not isinstance(stop, str) and not stop:
        return None
    if tokenizer is None:
        raise InputError("Stop strings are searched in text; give the tokenizer too.")
    return tokenizer.find_stops(stop, after)
