"""Tell the spans that a text lacks ([T5, sections 3.1.4 and 3.3](https://arxiv.org/abs/1910.10683))."""

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
    """Spans of the text are replaced, each by a sentinel of its own, and told behind the text, after these sentinels.

    `Thank you <X> me to your party <Y> week .` is followed by `<X> for inviting <Y> last <Z>`. The text is a prefix in
    which tokens see each other, as T5's encoder sees it.

    **Arguments:**

    - `ids`: one text.
    - `random`: draws the spans.
    - `sentinels`: ids that stand for spans, in this order.
    - `density`: which part of the text is taken out.
    - `mean_span`: how many tokens a span has on average.

    **Raises:** `InputError` if there are fewer than two tokens, or fewer sentinels than spans and one for the end, or a
    number is out of its range.
    """
    check_arguments(replace_spans, density=density, mean_span=mean_span)
    text, spans = _taken_out(np.asarray(ids, np.int32), random, density, mean_span)
    if len(spans) + 1 > len(sentinels):
        raise InputError(
            f"A text of {len(ids)} tokens has {len(spans)} spans, and with one for the end takes {len(spans) + 1} "
            f"sentinels, not {len(sentinels)}; give more, or shorter texts."
        )
    marks = [np.asarray([sentinel], np.int32) for sentinel in sentinels[: len(spans) + 1]]
    # Text, sentinel, text, sentinel, until the last part is taken out; then sentinel, span, ..., and the last sentinel.
    prefix = [part for pair in zip(text, marks[:-1], strict=True) for part in pair]
    told = [part for pair in zip(marks[:-1], spans, strict=True) for part in pair]
    return prefix_lm(np.concatenate([*prefix, *told, marks[-1]]), sum(map(len, prefix)))


def drop_spans(ids: Ids, random: np.random.Generator, *, density: Share = 0.15, mean_span: Length = 3.0) -> Example:
    """Spans of the text are left out without a trace, and told behind it, one after the other.

    **Arguments:** as of [`mistral_eqx.train.replace_spans`][].

    **Raises:** `InputError` if there are fewer than two tokens, or a number is out of its range.
    """
    check_arguments(drop_spans, density=density, mean_span=mean_span)
    text, spans = _taken_out(np.asarray(ids, np.int32), random, density, mean_span)
    prefix = np.concatenate(text)
    return prefix_lm(np.concatenate([prefix, *spans]), len(prefix))


def _taken_out(
    ids: Int[np.ndarray, " tokens"], random: np.random.Generator, density: float, mean_span: float
) -> tuple[list[Int[np.ndarray, " kept"]], list[Int[np.ndarray, " span"]]]:
    """The parts that stay, and the spans between them; the text begins with a part and ends with a span."""
    if len(ids) < 2:
        raise InputError(f"A text of {len(ids)} tokens has no span beside others; give two or more ids.")
    noise = min(max(1, round(density * len(ids))), len(ids) - 1)
    count = min(max(1, round(noise / mean_span)), noise, len(ids) - noise)
    kept, spans = (_lengths(total, count, random) for total in (len(ids) - noise, noise))
    ends = np.cumsum(np.stack([kept, spans], axis=1).reshape(-1))
    parts = np.split(ids, ends[:-1])
    return parts[0::2], parts[1::2]


def _lengths(total: int, count: int, random: np.random.Generator) -> Int[np.ndarray, " count"]:
    """`count` lengths of at least 1 that add up to `total`, each way to cut it as likely as another."""
    cuts: Bool[np.ndarray, " places"] = random.permutation(np.arange(total - 1) < count - 1)
    return np.diff(np.concatenate([[0], np.flatnonzero(cuts) + 1, [total]]))
