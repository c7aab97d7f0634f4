"""Stop strings: words that end a text, wherever in its tokens they begin."""

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

    The text ends before the stop string. What may be the beginning of one is held back, so nothing that was given has
    to be taken away again. Control tokens are no text, but a stop string that has the name of one is found too.

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

    def __init__(self, tokenizer: Tokens, stop: str | Sequence[str], *, after: Ids = ()):
        """**Arguments:**

        - `tokenizer`: whose tokens will come.
        - `stop`: one string or several.
        - `after`: the ids that the tokens continue, as for [`mistral_eqx.Detokenizer`][].

        **Raises:** `ValueError` if a stop string is empty.
        """
        self.stopped = None
        self._stops = checked_stops(stop)
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, after=after)
        self._held = ""  # with names of control tokens
        self._text: list[int] = []  # where the characters in it are that are no name

    def push(self, id: SupportsIndex) -> str:
        """Takes the next token.

        **Returns:** the text that is now certain, perhaps `""`.

        **Raises:** `ValueError` if `id` is negative.
        """
        if self.stopped is not None:
            return ""
        text = self._detokenizer.push(id)
        if (id := operator.index(id)) in self._tokenizer.special_ids:
            return self._add(self._tokenizer.token_name(id), is_text=False)
        return self._add(text)

    def flush(self) -> str:
        """Ends the text: what was held back was no stop string."""
        text = "" if self.stopped is not None else self._add(self._detokenizer.flush())
        return text + self._release(len(self._held))

    def _add(self, added: str, *, is_text: bool = True) -> str:
        if is_text:
            self._text += range(len(self._held), len(self._held) + len(added))
        self._held += added
        # Stop strings are looked for in the text, and in the text with the names of control tokens.
        views: list[tuple[str, Sequence[int]]] = [(self._held, range(len(self._held)))]
        if len(self._text) < len(self._held):
            views.append(("".join(self._held[at] for at in self._text), self._text))
        # The first that is complete, as if the characters had come one by one; of two, the longer one.
        found = min(
            (
                (places[at + len(stop) - 1], places[at], stop)
                for text, places in views
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
                    places[len(text) - length]
                    for text, places in views
                    for stop in self._stops
                    for length in range(1, len(stop))
                    if text.endswith(stop[:length])
                ),
                default=len(self._held),
            )
        )

    def _release(self, end: int) -> str:
        """The text in what is held up to `end`, from where on it is still held."""
        count = bisect.bisect_left(self._text, end)
        text = "".join(self._held[at] for at in self._text[:count])
        self._held, self._text = self._held[end:], [at - end for at in self._text[count:]]
        return text


class StopRows:
    """Where the rows of a batch meet a stop string.

    **Attributes:**

    - `lengths`: for each row the number of tokens up to the one that completed it, or -1.
    - `texts`: the text of each row, certain so far.
    """

    lengths: Int[np.ndarray, " rows"]
    texts: list[str]

    def __init__(self, tokenizer: Tokens, stop: str | Sequence[str], after: Sequence[Ids]):
        self.lengths = np.full(len(after), -1)
        self.texts = [""] * len(after)
        self._rows = [StopText(tokenizer, stop, after=ids) for ids in after]
        self._read = [0] * len(after)

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
