"""The sampler that the options of a command ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..generation import Sampler


def make_sampler(
    *,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    typical_p: float | None,
    repetition_penalty: float | None,
    presence_penalty: float | None,
    frequency_penalty: float | None,
    min_new_tokens: int = 0,
) -> Sampler:
    """A sampler with a processor for each penalty that was given.

    **Raises:** `ValueError` if a value is outside its range.
    """
    import mistral_eqx as mx

    processors: list[mx.AbstractProcessor] = []
    if repetition_penalty is not None:
        processors.append(mx.RepetitionPenalty(repetition_penalty))
    if presence_penalty is not None:
        processors.append(mx.PresencePenalty(presence_penalty))
    if frequency_penalty is not None:
        processors.append(mx.FrequencyPenalty(frequency_penalty))
    if min_new_tokens:
        processors.append(mx.MinNewTokens(min_new_tokens))
    return mx.Sampler(temperature, top_k, top_p, min_p, typical_p, processors)
