"""Say the next token: the one place where labels are shifted."""

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float, Int, Integer

from ...errors import InputError
from ..batch import Example


# The tokens of one text.
Ids = Sequence[int] | Integer[np.ndarray, " tokens"]
# How much it counts to tell each of them.
Weights = Sequence[float | int] | Float[np.ndarray, " tokens"]


def causal(ids: Ids, learned: Weights | None = None) -> Example:
    """Each token is told from those before it.

    **Arguments:**

    - `ids`: one text.
    - `learned`: how much it counts to tell each token; 1 unless given. The first token is told by none.

    **Raises:** `ValueError` if there are fewer than two tokens.
    """
    return shifted(ids, 1, learned)


def prefix_lm(ids: Ids, prefix: SupportsIndex) -> Example:
    """The tokens of a prefix see each other, and each one behind it is told from those before it
    ([T5, section 3.2.1](https://arxiv.org/abs/1910.10683)).

    T5 draws the end of the prefix at random: `prefix_lm(ids, random.integers(1, len(ids)))`.

    **Arguments:**

    - `ids`: one text.
    - `prefix`: how many tokens the prefix has; at least 1, and at most all but one.

    **Raises:** `ValueError` if `prefix` is outside of that.
    """
    prefix = operator.index(prefix)
    if not 1 <= prefix < len(ids):
        raise InputError(f"A prefix of {prefix} tokens leaves nothing to read or to tell of {len(ids)}; change it.")
    return shifted(ids, prefix, (np.arange(len(ids)) >= prefix).astype(np.float32))


def shifted(
    ids: Ids,
    prefix: int,
    learned: Weights | None = None,
    positions: Int[np.ndarray, " tokens"] | None = None,
) -> Example:
    """Inputs that are all tokens but the last, and targets that are all but the first.

    **Arguments:**

    - `ids`, `learned`: as of `causal`.
    - `prefix`: the first so many see each other.
    - `positions`: where the tokens stand; one after the other unless given.
    """
    whole = np.asarray(ids, np.int32)
    if len(whole) < 2:
        raise InputError(f"A text of {len(whole)} tokens has none that another one tells; give two or more ids.")
    weights = np.ones(len(whole), np.float32) if learned is None else np.asarray(learned, np.float32)
    columns = np.arange(len(whole), dtype=np.int32)
    positions = columns if positions is None else positions
    return Example(whole[:-1], whole[1:], weights[1:], positions[:-1], np.maximum(columns, prefix - 1)[:-1])
