"""Tell tokens that were masked."""

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
    """Tokens that were masked are told from all others, before them and behind
    ([BERT, section 3.1](https://arxiv.org/abs/1810.04805)).

    Of those that are chosen, 80 % become the mask, 10 % a random token, and 10 % stay. Nothing is shifted: each is told
    where it stands.

    **Arguments:**

    - `ids`: one text.
    - `random`: draws which tokens, and what they become.
    - `mask_id`: the token that stands for a masked one.
    - `vocab`: random tokens are below this.
    - `probability`: which part of the tokens is chosen; at least one is.
    - `never`: ids that are not chosen, such as those of control tokens.

    **Raises:** `InputError` if no token can be chosen, or an argument is out of its range.
    """
    check_arguments(bert_mask, mask_id=mask_id, vocab=vocab, probability=probability)
    whole = np.asarray(ids, np.int32)
    choosable = np.flatnonzero(~np.isin(whole, never))
    if not len(choosable):
        raise InputError(f"None of {len(whole)} tokens may be masked; give a text with others than those in `never`.")
    chosen = np.zeros(len(whole), bool)
    chosen[random.choice(choosable, max(1, round(probability * len(choosable))), replace=False)] = True
    columns = np.arange(len(whole), dtype=np.int32)
    inputs = _disguised(whole, chosen, random, mask_id, vocab)
    return Example(inputs, whole, chosen.astype(np.float32), columns, np.full_like(columns, len(whole) - 1))


def mass(ids: Ids, random: np.random.Generator, *, mask_id: CountOrZero, vocab: Count, part: Share = 0.5) -> Example:
    """A fragment of the text, masked there, is told token by token from the rest and from what was told
    ([MASS](https://arxiv.org/abs/1905.02450)).

    The text, in which tokens see each other, comes first; behind it stands the fragment, shifted, each token told at
    the position that it had. In the text, 80 % of the fragment become the mask, 10 % random tokens, and 10 % stay.

    **Arguments:** as of [`mistral_eqx.train.bert_mask`][], and

    - `part`: how much of the text the fragment is; at least one token, and at most all but one.

    **Raises:** `InputError` if there are fewer than two tokens, or an argument is out of its range.
    """
    check_arguments(mass, mask_id=mask_id, vocab=vocab, part=part)
    whole = np.asarray(ids, np.int32)
    if len(whole) < 2:
        raise InputError(f"A text of {len(whole)} tokens has no fragment beside others; give two or more ids.")
    length = min(max(1, round(part * len(whole))), len(whole) - 1)
    start = int(random.integers(0, len(whole) - length + 1))
    columns = np.arange(len(whole), dtype=np.int32)
    in_fragment = (columns >= start) & (columns < start + length)
    text = _disguised(whole, in_fragment, random, mask_id, vocab)
    # The mask stands where the fragment's first token is to be told, and each token where the next one is.
    sequence = np.concatenate([text, [mask_id], whole[in_fragment]]).astype(np.int32)
    positions = np.concatenate([columns, columns[in_fragment], [start + length]]).astype(np.int32)
    learned = np.arange(len(sequence)) > len(whole)
    return shifted(sequence, len(whole), learned.astype(np.float32), positions)


def _disguised(
    ids: Int[np.ndarray, " tokens"],
    chosen: Bool[np.ndarray, " tokens"],
    random: np.random.Generator,
    mask_id: int,
    vocab: int,
) -> Int[np.ndarray, " tokens"]:
    lot = random.random(len(ids))
    drawn = random.integers(0, vocab, len(ids), dtype=np.int32)
    return np.where(chosen & (lot < 0.8), mask_id, np.where(chosen & (lot < 0.9), drawn, ids)).astype(np.int32)
