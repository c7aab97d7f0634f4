"""Log-probabilities in the form of chat completions, and what both forms share."""

from collections.abc import Sequence
from typing import Any

from ..engine import Event, LogProb
from ..text import AbstractTokenizer


# OpenAI's number for a probability of 0, because JSON has no infinity.
_LEAST = -9999.0


def clamped(log_prob: float) -> float:
    """A number that JSON has."""
    return max(log_prob, _LEAST)


def without_end(event: Event, tokenizer: AbstractTokenizer) -> Sequence[LogProb]:
    """The log-probabilities of an event, without that of the end token, which is no part of the text."""
    ended = event.finish == "stop" and event.stopped is None and event.ids and event.ids[-1] in tokenizer.eos_ids
    return event.log_probs[:-1] if ended else event.log_probs


def chat_log_probs(log_probs: Sequence[LogProb], tokenizer: AbstractTokenizer) -> list[dict[str, Any]]:
    """Log-probabilities in the form of chat completions."""
    return [
        {
            **_entry(one.id, one.log_prob, tokenizer),
            "top_logprobs": [_entry(id, log_prob, tokenizer) for id, log_prob in one.top],
        }
        for one in log_probs
    ]


def _entry(id: int, log_prob: float, tokenizer: AbstractTokenizer) -> dict[str, Any]:
    known = id < tokenizer.vocab  # models may pad their embedding
    content = tokenizer.token_bytes(id, first=False) if known else b""
    return {"token": content.decode(errors="replace"), "logprob": clamped(log_prob), "bytes": list(content)}
