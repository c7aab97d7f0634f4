"""Stop strings: texts that end generation, at any position relative to token boundaries."""

import bisect
import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int

from ..errors import InputError
from .detokenizer import Detokenizer
from .tokens import Ids, Tokens


class StopText:
    """Turns tokens into text one by one, until a stop string is complete.

    The text ends before the stop string. Text that may be the beginning of a stop string is held back until that is
    known. By default control tokens are not part of the text, but a stop string may contain the name of one.

    ```python
    text = StopText(tokenizer, ["\\n\\n"], after=ids)
    for (token,) in mx.stream(model, [ids], max_new_tokens=64, stop=["\\n\\n"], tokenizer=tokenizer):
        print(text.push(token), end="")
    print(text.flush())
    ```

    **Attributes:**

    - `stopped`: the stop string that was found, or `None`.
    """

    stopped: str | None

    def __init__(self, tokenizer: Tokens, stop: str | Sequence[str], *, skip_special: bool = True, after: Ids = ()):
        """**Arguments:**

        - `tokenizer`: the tokenizer of the tokens.
        - `stop`: one string or several.
        - `skip_special`: whether to omit control tokens; otherwise their names appear in the text, such as for a
            [`mistral_eqx.ReplyParser`][].
        - `after`: the ids before the tokens, as for [`mistral_eqx.Detokenizer`][].

        **Raises:** `ValueError` if a stop string is empty.
        """
        self.stopped = None
        self._stops = checked_stops(stop)
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._detokenizer = Detokenizer(tokenizer, after=after)
        self._held = ""  # text that is held back, with the names of control tokens
        self._text: list[int] = []  # positions in `_held` of the characters that are not in a name

    def push(self, id: SupportsIndex) -> str:
        """Adds the next token.

        **Returns:** the text that cannot be in a stop string any more; it may be `""`.

        **Raises:** `ValueError` if `id` is negative.
        """
        if self.stopped is not None:
            return ""
        text = self._detokenizer.push(id)
        if (id := operator.index(id)) in self._tokenizer.special_ids:
            return self._add(self._tokenizer.token_name(id), is_text=not self._skip_special)
        return self._add(text)

    def flush(self) -> str:
        """Ends the text, and returns the rest that was held back."""
        text = "" if self.stopped is not None else self._add(self._detokenizer.flush())
        return text + self._release(len(self._held))

    def _add(self, added: str, *, is_text: bool = True) -> str:
        if is_text:
            self._text += range(len(self._held), len(self._held) + len(added))
        self._held += added
        # The search covers the text, and the text with the names of control tokens.
        views: list[tuple[str, Sequence[int]]] = [(self._held, range(len(self._held)))]
        if len(self._text) < len(self._held):
            views.append(("".join(self._held[at] for at in self._text), self._text))
        # The stop string that ends first wins, then the longer one: the same result as with one character at a time.
        found = min(
            (
                (positions[at + len(stop) - 1], positions[at], stop)
                for text, positions in views
                for stop in self._stops
                if (at := text.find(stop)) >= 0
            ),
            default=None,
        )
        if found is not None:
            _, at, self.stopped = found
            text = self._release(at)
            self._held, self._text = "", []
            return text
        return self._release(
            min(
                (
                    positions[len(text) - length]
                    for text, positions in views
                    for stop in self._stops
                    for length in range(1, len(stop))
                    if text.endswith(stop[:length])
                ),
                default=len(self._held),
            )
        )

    def _release(self, end: int) -> str:
        """Returns the text before position `end` of `_held`, and keeps the rest."""
        count = bisect.bisect_left(self._text, end)
        text = "".join(self._held[at] for at in self._text[:count])
        self._held, self._text = self._held[end:], [at - end for at in self._text[count:]]
        return text


class StopRows:
    """Finds stop strings in the rows of a batch.

    **Attributes:**

    - `lengths`: for each row, the number of tokens until its stop string is complete, or -1.
    - `texts`: the text of each row so far, without text that is held back.
    """

    lengths: Int[np.ndarray, " rows"]
    texts: list[str]

    def __init__(self, tokenizer: Tokens, stop: str | Sequence[str], after: Sequence[Ids]):
        self.lengths = np.full(len(after), -1)
        self.texts = [""] * len(after)
        self._rows = [StopText(tokenizer, stop, after=ids) for ids in after]
        self._read = [0] * len(after)

    def read(self, tokens: Int[np.ndarray, "rows new"], lengths: Int[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
        """Reads the tokens that are new since the last call.

        **Arguments:**

        - `tokens`: all tokens so far.
        - `lengths`: the number of tokens of each row so far.

        **Returns:** which rows have stopped.
        """
        for row, (text, length) in enumerate(zip(self._rows, lengths.tolist(), strict=True)):
            while text.stopped is None and self._read[row] < length:
                self.texts[row] += text.push(tokens[row, self._read[row]])
                self._read[row] += 1
                if text.stopped is not None:
                    self.lengths[row] = self._read[row]
        return self.lengths >= 0

    def flush(self) -> list[str]:
        """Ends and returns all texts."""
        self.texts = [before + text.flush() for before, text in zip(self.texts, self._rows, strict=True)]
        return self.texts


def checked_stops(stop: str | Iterable[str]) -> tuple[str, ...]:
    """Stop strings as a tuple.

    **Raises:** `ValueError` if one is empty, or is not a string.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for one in stops:
        if not isinstance(one, str) or not one:
            raise InputError(f"The stop string {one!r} must be a string of at least one character; leave it out.")
    return stops
