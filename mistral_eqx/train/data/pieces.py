"""Documents cut to the length of a row."""

import numpy as np
from jaxtyping import Int

from ...checks import Count, check_arguments
from ...errors import InputError
from .texts import located
from .tokens import Tokens


class Pieces:
    """Pieces of documents, as [`mistral_eqx.train.cut`][] makes them: a piece starts with the last token of the one
    before, and each token but a document's first is a target once.

    A document of fewer than two tokens has no piece: nothing in it can be told.
    """

    def __init__(self, tokens: Tokens, seq: Count):
        """**Arguments:**

        - `tokens`: of documents.
        - `seq`: how many columns a row has. A piece has at most one token more.

        **Raises:** `ValueError` if no document has two tokens.
        """
        check_arguments(Pieces.__init__, seq=seq)
        self.tokens = tokens
        self.seq = seq
        # The last piece starts before the last token.
        self._stops = np.cumsum(np.maximum(tokens.lengths - 1 + seq - 1, 0) // seq)
        if not len(self):
            raise InputError(f"None of {len(tokens)} documents has two tokens, so nothing is told; give others.")

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: int) -> Int[np.ndarray, " piece"]:
        """The ids of a piece."""
        document, piece = located(self._stops, index)
        start, stop = self.tokens.offsets[document : document + 2]
        start += piece * self.seq
        return np.array(self.tokens.ids[start : min(start + self.seq + 1, stop)], np.int32)
