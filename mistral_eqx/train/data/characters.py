"""Say the next character, after [minGPT](https://github.com/karpathy/minGPT)'s demo."""

import operator
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np

from ...checks import Count, check_arguments
from ...errors import InputError
from ..batch import Example
from ..objective import causal


class Characters:
    """A text in pieces, a token for each of its characters.

    The last tenth of the text is held out. Pieces for training start at each character; those that are held out follow
    one another, so that each of their characters is told once.

    **Attributes:**

    - `alphabet`: the characters of the whole text in order; a character's token is its place.
    - `vocab`: how many there are.
    - `seq`: how many columns an example has; the last one that is held out may have fewer.
    """

    alphabet: str
    vocab: int
    seq: int

    def __init__(self, text: str, seq: Count, *, held_out: bool = False):
        """**Arguments:**

        - `text`: all of it, in memory.
        - `seq`: how many columns a row has.
        - `held_out`: whether these are the pieces that are kept from training.

        **Raises:** `ValueError` if the text has too few characters for one piece.
        """
        check_arguments(Characters.__init__, seq=seq)
        self.alphabet = "".join(sorted(set(text)))
        self.vocab = len(self.alphabet)
        self.seq = seq
        at = len(text) - len(text) // 10
        part = text[at:] if held_out else text[:at]
        if len(part) < seq + 1:
            raise InputError(
                f"A text of {len(text)} characters, a tenth of it held out, is too short for rows of {seq}; give a "
                "longer one, or make the rows shorter."
            )
        self._ids = np.asarray(self.encode(part), np.int32)
        self._starts = range(0, len(part) - 1, seq) if held_out else range(len(part) - seq)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        start = self._starts[index]
        return causal(self._ids[start : start + self.seq + 1])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text.

        **Raises:** `ValueError` if it has a character that is not in the alphabet.
        """
        place = {character: token for token, character in enumerate(self.alphabet)}
        unknown = set(text) - place.keys()
        if unknown:
            raise InputError(f"The text has the character {min(unknown)!r}, which was not learned; leave it out.")
        return [place[character] for character in text]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of tokens; those past the alphabet, which a larger model may say, are no text."""
        return "".join(self.alphabet[token] for token in ids if operator.index(token) < len(self.alphabet))
