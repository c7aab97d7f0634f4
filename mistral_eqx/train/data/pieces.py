"""Documents cut into chunks that fit into a row."""

import numpy as np
from jaxtyping import Int

from ...checks import Count, check_arguments
from ...errors import InputError
from .texts import locate
from .tokens import Tokens


class Pieces:
    """Chunks of documents, as [`mistral_eqx.train.cut`][] makes them: a chunk starts with the last token of the chunk
    before, and each token but a document's first is a target once.

    A document of fewer than two tokens has no chunk, because it has no target.
    """

    def __init__(self, tokens: Tokens, seq: Count):
        """**Arguments:**

        - `tokens`: the tokens of the documents.
        - `seq`: the number of columns of a row. A chunk has at most `seq + 1` tokens.

        **Raises:** `ValueError` if no document has two tokens.
        """
        check_arguments(Pieces.__init__, seq=seq)
        self.tokens = tokens
        self.seq = seq
        # A document of n tokens has n - 1 targets, of which each chunk has at most `seq`.
        self._stops = np.cumsum(np.maximum(tokens.lengths - 1 + seq - 1, 0) // seq)
        if not len(self):
            raise InputError(f"None of {len(tokens)} documents has two tokens, so there is no target; give others.")

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: int) -> Int[np.ndarray, " chunk"]:
        """The ids of a chunk."""
        document, chunk = locate(self._stops, index)
        start, stop = self.tokens.offsets[document : document + 2]
        start += chunk * self.seq
        return np.array(self.tokens.ids[start : min(start + self.seq + 1, stop)], np.int32)
