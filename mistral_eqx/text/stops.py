"""Stop strings: words that end a text, wherever in its tokens they begin."""

from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int

from ..errors import InputError
from .detokenizer import Detokenizer
from .tokenizer import AbstractTokenizer


class StopText:
    """Turns tokens into text one by one, until a stop string is complete.

    The text ends before the stop string. What may be the beginning of one is held back, so nothing that was given has
    to be taken away again.

    ```python
    text = StopText(tokenizer, ["\\n\\n"])
    for (token,) in mx.stream(model, [ids], max_new_tokens=64, stop=["\\n\\n"], tokenizer=tokenizer):
        print(text.push(token), end="")
    print(text.flush())
    ```

    **Attributes:**

    - `stopped`: the stop string that was found, or `None`.
    """

    stopped: str | None

    def __init__(self, tokenizer: AbstractTokenizer, stop: str | Sequence[str]):
        """**Arguments:**

        - `tokenizer`: whose tokens will come.
        - `stop`: one string or several.

        **Raises:** `ValueError` if one is empty.
        """
        self.stopped = None
        self._stops = checked_stops(stop)
        self._detokenizer = Detokenizer(tokenizer)
        self._held = ""

    def push(self, id: SupportsIndex) -> str:
        """Takes the next token.

        **Returns:** the text that is now certain, perhaps `""`.

        **Raises:** `ValueError` if `id` is outside the vocabulary.
        """
        return "" if self.stopped is not None else self._add(self._detokenizer.push(id))

    def flush(self) -> str:
        """Ends the text: what was held back was no stop string."""
        text = "" if self.stopped is not None else self._add(self._detokenizer.flush())
        held, self._held = self._held, ""
        return text + held

    def _add(self, text: str) -> str:
        text = self._held + text
        # The first that is complete, as if the characters had come one by one; of two, the longer one.
        found = min(((at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            _, at, self.stopped = found
            self._held = ""
            return text[:at]
        held = max(
            (length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length])),
            default=0,
        )
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]


class StopRows:
    """Where the rows of a batch meet a stop string.

    **Attributes:**

    - `lengths`: for each row the number of tokens up to the one that completed it, or -1.
    - `texts`: the text of each row, certain so far.
    """

    lengths: Int[np.ndarray, " rows"]
    texts: list[str]

    def __init__(self, tokenizer: AbstractTokenizer, stop: str | Sequence[str], rows: int):
        self.lengths = np.full(rows, -1)
        self.texts = [""] * rows
        self._rows = [StopText(tokenizer, stop) for _ in range(rows)]
        self._read = [0] * rows

    def read(self, tokens: Int[np.ndarray, "rows new"], lengths: Int[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
        """Takes all tokens so far, of which those before are not looked at again.

        **Returns:** which rows have stopped by now.
        """
        for row, (text, length) in enumerate(zip(self._rows, lengths.tolist(), strict=True)):
            while text.stopped is None and self._read[row] < length:
                self.texts[row] += text.push(tokens[row, self._read[row]])
                self._read[row] += 1
                if text.stopped is not None:
                    self.lengths[row] = self._read[row]
        return self.lengths >= 0

    def flush(self) -> list[str]:
        """Ends all texts, and returns them."""
        self.texts = [before + text.flush() for before, text in zip(self.texts, self._rows, strict=True)]
        return self.texts


def checked_stops(stop: str | Iterable[str]) -> tuple[str, ...]:
    """Stop strings as a tuple.

    **Raises:** `ValueError` if one is empty, or is no string.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for one in stops:
        if not isinstance(one, str) or not one:
            raise InputError(f"The stop string {one!r} must be a string of at least one character; leave it out.")
    return stops
