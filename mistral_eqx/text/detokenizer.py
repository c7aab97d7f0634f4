"""Incremental detokenization: text from tokens, one by one."""

import codecs
from typing import SupportsIndex

from .tokens import Ids, Tokens


class Detokenizer:
    """Turns tokens into text one by one, and never returns an incomplete character.

    The results of `push` and `flush` together are `tokenizer.decode` of the same ids. The cost of a token does not
    depend on the length of the text.

    ```python
    detokenizer = Detokenizer(tokenizer, after=prompt)
    for id in ids:
        print(detokenizer.push(id), end="")
    print(detokenizer.flush())
    ```
    """

    def __init__(self, tokenizer: Tokens, *, skip_special: bool = True, after: Ids = ()):
        """**Arguments:**

        - `tokenizer`: the tokenizer of the tokens.
        - `skip_special`: whether to omit control tokens; otherwise their names appear in the text.
        - `after`: the ids before the tokens, such as a prompt, as for
            [`mistral_eqx.text.AbstractTokenizer.decode`][]. Without them, the tokens begin a text, and its first word
            has no leading space.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begins = self._first = tokenizer.begins_text(after, skip_special=skip_special)

    def push(self, id: SupportsIndex) -> str:
        """Adds the next token.

        **Returns:** the new text, up to the last complete character; it may be `""`.

        **Raises:** `ValueError` if `id` is negative.
        """
        id = self._tokenizer.checked_id(id)
        if id in self._skipped or id >= self._tokenizer.vocab:
            return ""
        first, self._first = self._first, False
        return self._characters.decode(self._tokenizer.token_bytes(id, first=first))

    def flush(self) -> str:
        """Ends the text, and resets the detokenizer to its initial state.

        **Returns:** U+FFFD if the last character is incomplete, else `""`.
        """
        self._first = self._begins
        rest = self._characters.decode(b"", final=True)
        self._characters.reset()
        return rest
