"""Text as its tokens arrive."""

import codecs
from typing import SupportsIndex

from .tokens import Ids, Tokens


class Detokenizer:
    """Turns tokens into text one by one, and never gives half a character.

    What `push` and `flush` return adds up to `tokenizer.decode` of the same ids. Each token costs the same,
    however long the text has become.

    ```python
    detokenizer = Detokenizer(tokenizer, after=prompt)
    for id in ids:
        print(detokenizer.push(id), end="")
    print(detokenizer.flush())
    ```
    """

    def __init__(self, tokenizer: Tokens, *, skip_special: bool = True, after: Ids = ()):
        """**Arguments:**

        - `tokenizer`: whose tokens will come.
        - `skip_special`: whether control tokens leave no trace; otherwise their names appear.
        - `after`: the ids that the tokens continue, such as a prompt's, as for
            [`mistral_eqx.text.AbstractTokenizer.decode`][]. Without them the tokens begin a text, and its first word
            has no space in front.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begins = self._first = tokenizer.begins_text(after, skip_special=skip_special)

    def push(self, id: SupportsIndex) -> str:
        """Takes the next token.

        **Returns:** the text that is now certain, perhaps `""`.

        **Raises:** `ValueError` if `id` is negative.
        """
        id = self._tokenizer.checked_id(id)
        if id in self._skipped or id >= self._tokenizer.vocab:
            return ""
        first, self._first = self._first, False
        return self._characters.decode(self._tokenizer.token_bytes(id, first=first))

    def flush(self) -> str:
        """Ends the text; the next token starts another one in its place.

        **Returns:** U+FFFD if the last character lacks bytes, else `""`.
        """
        self._first = self._begins
        rest = self._characters.decode(b"", final=True)
        self._characters.reset()
        return rest
