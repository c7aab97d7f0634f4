"""Predict masked tokens."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from ...checks import Count, CountOrZero, Share, check_arguments
from ...errors import InputError
from ..batch import Example
from .causal import Ids, shifted


def bert_mask(
    ids: Ids,
    random: np.random.Generator,
    *,
    mask_id: CountOrZero,
    vocab: Count,
    probability: Share = 0.15,
    never: Sequence[int] = (),
) -> Example:
    """Predicts masked tokens from all others, before and after them
    ([BERT, section 3.1](https://arxiv.org/abs/1810.04805)).

    Of the chosen tokens, 80 % become the mask token, 10 % become a random token, and 10 % stay. Targets are not
    shifted: each is at its own column.

    **Arguments:**

    - `ids`: one sequence.
    - `random`: the generator that draws the chosen tokens and their replacements.
    - `mask_id`: the id of the mask token.
    - `vocab`: random tokens are below this.
    - `probability`: the part of the tokens that is chosen; at least one is.
    - `never`: ids that are never chosen, such as those of control tokens.

    **Raises:** `InputError` if no token can be chosen, or an argument is out of its range.
    """
    check_arguments(bert_mask, mask_id=mask_id, vocab=vocab, probability=probability)
    whole = np.asarray(ids, np.int32)
    choosable = np.flatnonzero(~np.isin(whole, never))
    if not len(choosable):
        raise InputError(
            f"None of {len(whole)} tokens may be masked; give a sequence with tokens that are not in `never`."
        )
    chosen = np.zeros(len(whole), bool)
    chosen[random.choice(choosable, max(1, round(probability * len(choosable))), replace=False)] = True
    columns = np.arange(len(whole), dtype=np.int32)
    inputs = _corrupted(whole, chosen, random, mask_id, vocab)
    return Example(inputs, whole, chosen.astype(np.float32), columns, np.full_like(columns, len(whole) - 1))


def mass(ids: Ids, random: np.random.Generator, *, mask_id: CountOrZero, vocab: Count, part: Share = 0.5) -> Example:
    """Masks a fragment of the sequence, and predicts it token by token from the rest and from its earlier tokens
    ([MASS](https://arxiv.org/abs/1905.02450)).

    The sequence comes first, with bidirectional attention; the fragment follows, and its tokens keep the positions that
    they have in the sequence. In the sequence, 80 % of the fragment become the mask token, 10 % random tokens, and 10 %
    stay.

    **Arguments:** as for [`mistral_eqx.train.bert_mask`][], and

    - `part`: the part of the sequence that is the fragment; at least one token, and at most all but one.

    **Raises:** `InputError` if there are fewer than two tokens, or an argument is out of its range.
    """
    check_arguments(mass, mask_id=mask_id, vocab=vocab, part=part)
    whole = np.asarray(ids, np.int32)
    if len(whole) < 2:
        raise InputError(
            f"A sequence of {len(whole)} tokens cannot have both a fragment and other tokens; give two or more ids."
        )
    length = min(max(1, round(part * len(whole))), len(whole) - 1)
    start = int(random.integers(0, len(whole) - length + 1))
    columns = np.arange(len(whole), dtype=np.int32)
    in_fragment = (columns >= start) & (columns < start + length)
    masked = _corrupted(whole, in_fragment, random, mask_id, vocab)
    # The mask token is the input for the fragment's first target, and each token is the input for the next one.
    sequence = np.concatenate([masked, [mask_id], whole[in_fragment]]).astype(np.int32)
    positions = np.concatenate([columns, columns[in_fragment], [start + length]]).astype(np.int32)
    learned = np.arange(len(sequence)) > len(whole)
    return shifted(sequence, len(whole), learned.astype(np.float32), positions)


def _corrupted(
    ids: Int[np.ndarray, " tokens"],
    chosen: Bool[np.ndarray, " tokens"],
    random: np.random.Generator,
    mask_id: int,
    vocab: int,
) -> Int[np.ndarray, " tokens"]:
    lot = random.random(len(ids))
    replacement = random.integers(0, vocab, len(ids), dtype=np.int32)
    return np.where(chosen & (lot < 0.8), mask_id, np.where(chosen & (lot < 0.9), replacement, ids)).astype(np.int32)
