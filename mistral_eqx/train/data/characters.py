"""Next-character prediction, after [minGPT](https://github.com/karpathy/minGPT)'s demo."""

import operator
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np

from ...checks import Count, check_arguments
from ...errors import InputError
from ..batch import Example
from ..objective import causal


class Characters:
    """Chunks of a text, with one token per character.

    The last tenth of the text is held out. A training chunk starts at every character; held-out chunks follow one
    another, so that each of their characters is a target once.

    **Attributes:**

    - `alphabet`: the characters of the whole text in order; a character's id is its index.
    - `vocab`: the number of characters in the alphabet.
    - `seq`: the number of columns of an example; the last held-out one may have fewer.
    """

    alphabet: str
    vocab: int
    seq: int

    def __init__(self, text: str, seq: Count, *, held_out: bool = False):
        """**Arguments:**

        - `text`: the whole text.
        - `seq`: the number of columns of a row.
        - `held_out`: selects the held-out chunks.

        **Raises:** `ValueError` if the text is too short for one chunk.
        """
        check_arguments(Characters.__init__, seq=seq)
        self.alphabet = "".join(sorted(set(text)))
        self.vocab = len(self.alphabet)
        self.seq = seq
        at = len(text) - len(text) // 10
        selected = text[at:] if held_out else text[:at]
        if len(selected) < seq + 1:
            raise InputError(
                f"A text of {len(text)} characters, a tenth of it held out, is too short for rows of {seq}; give a "
                "longer one, or make the rows shorter."
            )
        self._ids = np.asarray(self.encode(selected), np.int32)
        self._starts = range(0, len(selected) - 1, seq) if held_out else range(len(selected) - seq)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        start = self._starts[index]
        return causal(self._ids[start : start + self.seq + 1])

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        **Raises:** `ValueError` if it has a character that is not in the alphabet.
        """
        ids = {character: token for token, character in enumerate(self.alphabet)}
        unknown = set(text) - ids.keys()
        if unknown:
            raise InputError(
                f"The text has the character {min(unknown)!r}, which is not in the alphabet; leave it out."
            )
        return [ids[character] for character in text]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ids; ids past the alphabet, which a model with a larger vocabulary may generate, are left out."""
        return "".join(self.alphabet[token] for token in ids if operator.index(token) < len(self.alphabet))
