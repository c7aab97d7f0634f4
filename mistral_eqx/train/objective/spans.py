"""Predict spans that were taken out of a sequence ([T5, sections 3.1.4 and 3.3](https://arxiv.org/abs/1910.10683))."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from annotated_types import Ge
from jaxtyping import Bool, Int

from ...checks import Share, check_arguments
from ...errors import InputError
from ..batch import Example
from .causal import Ids, prefix_lm


Length = Annotated[float, Ge(1)]


def replace_spans(
    ids: Ids, random: np.random.Generator, *, sentinels: Sequence[int], density: Share = 0.15, mean_span: Length = 3.0
) -> Example:
    """Replaces spans of the sequence, each by its own sentinel, and predicts each span after its sentinel.

    `Thank you <X> me to your party <Y> week .` is followed by `<X> for inviting <Y> last <Z>`. The sequence with
    sentinels is a prefix with bidirectional attention, as in T5's encoder.

    **Arguments:**

    - `ids`: one sequence.
    - `random`: the generator that draws the spans.
    - `sentinels`: the ids of the sentinels, in this order.
    - `density`: the part of the tokens that is taken out.
    - `mean_span`: the average number of tokens in a span.

    **Raises:** `InputError` if there are fewer than two tokens, a number is out of its range, or there are fewer
    sentinels than one for each span and one for the end.
    """
    check_arguments(replace_spans, density=density, mean_span=mean_span)
    kept, spans = _split_spans(np.asarray(ids, np.int32), random, density, mean_span)
    if len(spans) + 1 > len(sentinels):
        raise InputError(
            f"A sequence of {len(ids)} tokens needs {len(spans) + 1} sentinels, one for each of {len(spans)} spans and "
            f"one for the end, not {len(sentinels)}; give more sentinels, or shorter sequences."
        )
    marks = [np.asarray([sentinel], np.int32) for sentinel in sentinels[: len(spans) + 1]]
    # Prefix: kept, sentinel, kept, sentinel, ...; target: sentinel, span, sentinel, span, ..., last sentinel.
    prefix = [part for pair in zip(kept, marks[:-1], strict=True) for part in pair]
    target = [part for pair in zip(marks[:-1], spans, strict=True) for part in pair]
    return prefix_lm(np.concatenate([*prefix, *target, marks[-1]]), sum(map(len, prefix)))


def drop_spans(ids: Ids, random: np.random.Generator, *, density: Share = 0.15, mean_span: Length = 3.0) -> Example:
    """Removes spans of the sequence without sentinels, and predicts them after it, one after the other.

    **Arguments:** as for [`mistral_eqx.train.replace_spans`][].

    **Raises:** `InputError` if there are fewer than two tokens, or a number is out of its range.
    """
    check_arguments(drop_spans, density=density, mean_span=mean_span)
    kept, spans = _split_spans(np.asarray(ids, np.int32), random, density, mean_span)
    prefix = np.concatenate(kept)
    return prefix_lm(np.concatenate([prefix, *spans]), len(prefix))


def _split_spans(
    ids: Int[np.ndarray, " tokens"], random: np.random.Generator, density: float, mean_span: float
) -> tuple[list[Int[np.ndarray, " kept"]], list[Int[np.ndarray, " span"]]]:
    """The kept parts and the spans between them; the sequence begins with a kept part and ends with a span."""
    if len(ids) < 2:
        raise InputError(
            f"A sequence of {len(ids)} tokens cannot have both a span and other tokens; give two or more ids."
        )
    noise = min(max(1, round(density * len(ids))), len(ids) - 1)
    count = min(max(1, round(noise / mean_span)), noise, len(ids) - noise)
    kept, spans = (_lengths(total, count, random) for total in (len(ids) - noise, noise))
    ends = np.cumsum(np.stack([kept, spans], axis=1).reshape(-1))
    parts = np.split(ids, ends[:-1])
    return parts[0::2], parts[1::2]


def _lengths(total: int, count: int, random: np.random.Generator) -> Int[np.ndarray, " count"]:
    """`count` lengths of at least 1 that add up to `total`, uniformly at random."""
    cuts: Bool[np.ndarray, " gaps"] = random.permutation(np.arange(total - 1) < count - 1)
    return np.diff(np.concatenate([[0], np.flatnonzero(cuts) + 1, [total]]))
