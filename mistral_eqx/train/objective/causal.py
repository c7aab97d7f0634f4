"""Next-token prediction; no other file shifts targets."""

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float, Int, Integer

from ...errors import InputError
from ..batch import Example


# The tokens of one sequence.
Ids = Sequence[int] | Integer[np.ndarray, " tokens"]
# The weight of each token as a target.
Weights = Sequence[float | int] | Float[np.ndarray, " tokens"]


def causal(ids: Ids, learned: Weights | None = None) -> Example:
    """Predicts each token from those before it.

    **Arguments:**

    - `ids`: one sequence.
    - `learned`: the weight of each token as a target; 1 unless given. The first token is no target.

    **Raises:** `ValueError` if there are fewer than two tokens.
    """
    return shifted(ids, 1, learned)


def prefix_lm(ids: Ids, prefix: SupportsIndex) -> Example:
    """Predicts each token after a prefix from those before it; attention inside the prefix is bidirectional
    ([T5, section 3.2.1](https://arxiv.org/abs/1910.10683)).

    T5 draws the end of the prefix at random: `prefix_lm(ids, random.integers(1, len(ids)))`.

    **Arguments:**

    - `ids`: one sequence.
    - `prefix`: the number of tokens in the prefix, from 1 to `len(ids) - 1`.

    **Raises:** `ValueError` if `prefix` is outside this range.
    """
    prefix = operator.index(prefix)
    if not 1 <= prefix < len(ids):
        raise InputError(
            f"A prefix of {prefix} tokens is not from 1 to {len(ids) - 1} for a sequence of {len(ids)}; change prefix."
        )
    return shifted(ids, prefix, (np.arange(len(ids)) >= prefix).astype(np.float32))


def shifted(
    ids: Ids,
    prefix: int,
    learned: Weights | None = None,
    positions: Int[np.ndarray, " tokens"] | None = None,
) -> Example:
    """An example whose inputs are all tokens but the last, and whose targets are all tokens but the first.

    **Arguments:**

    - `ids`, `learned`: as for `causal`.
    - `prefix`: the number of tokens at the start with bidirectional attention.
    - `positions`: the position of each token; 0, 1, 2, ... unless given.
    """
    whole = np.asarray(ids, np.int32)
    if len(whole) < 2:
        raise InputError(
            f"A sequence of {len(whole)} tokens has no token to predict from another; give two or more ids."
        )
    weights = np.ones(len(whole), np.float32) if learned is None else np.asarray(learned, np.float32)
    columns = np.arange(len(whole), dtype=np.int32)
    positions = columns if positions is None else positions
    return Example(whole[:-1], whole[1:], weights[1:], positions[:-1], np.maximum(columns, prefix - 1)[:-1])
