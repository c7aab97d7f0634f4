"""`/v1/completions`: what follows a prompt."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..engine import Answer, Event, LogProb
from ..errors import InputError
from ..text import AbstractTokenizer, Detokenizer
from .answering import Job
from .errors import of_input, refused
from .log_probs import clamped, without_end
from .protocol import MOST_CHOICES, CompletionRequest
from .service import Service


def completion_job(service: Service, asked: CompletionRequest) -> Job:
    """Encodes the prompts; may take a while.

    **Raises:** `ApiError`.
    """
    prompts = _prompts(asked.prompt)
    if len(prompts) * asked.n > MOST_CHOICES:
        raise refused(f"{len(prompts)} prompts times n={asked.n} are more than {MOST_CHOICES} choices.", "n")
    options = {**asked.options(), "adapter": service.adapter(asked.model)}
    requests, echoes = [], []
    for prompt in prompts:
        service.check_size(prompt, "prompt")
        ids = _encoded(service.tokenizer, prompt)
        request = service.request(ids, options, ignore_eos=asked.ignore_eos, param="prompt")
        echo = (prompt if isinstance(prompt, str) else service.tokenizer.decode(ids)) if asked.echo else ""
        requests += [dataclasses.replace(request, sample=sample) for sample in range(asked.n)]
        echoes += [echo] * asked.n
    return Job(
        asked,
        requests,
        lambda index, answer: TextChoice(index, answer, service.tokenizer, echoes[index], asked.logprobs is not None),
        "prompt",
        "cmpl",
        "text_completion",
        "text_completion",
    )


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request: a text, token ids, or a list of either."""
    several = prompt if isinstance(prompt, list) and not all(map(_is_id, prompt)) else [prompt]
    for one in several:
        if not isinstance(one, str) and not (isinstance(one, list) and all(map(_is_id, one))):
            raise refused("prompt must be a text, a list of token ids, or a list of either.", "prompt")
    if not several:
        raise refused("prompt has no entries; give at least one.", "prompt")
    return several


def _is_id(value: Any) -> bool:
    return type(value) is int


def _encoded(tokenizer: AbstractTokenizer, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        try:
            return tokenizer.encode(prompt)
        except InputError as error:
            raise of_input(error, "prompt") from None
    for id in prompt:
        if not 0 <= id < tokenizer.vocab:
            raise refused(f"prompt has a token id outside 0 to {tokenizer.vocab - 1}.", "prompt")
    return prompt


class TextChoice:
    """Writes a choice as text."""

    enough = False

    def __init__(self, index: int, answer: Answer, tokenizer: AbstractTokenizer, echo: str, with_log_probs: bool):
        self._index, self._tokenizer, self._echo = index, tokenizer, echo
        self._log_probs = _LogProbs(tokenizer, answer.prompt) if with_log_probs else None
        self._text: list[str] = [echo]
        self._finish: str | None = None

    def begin(self) -> list[dict[str, Any]]:
        return [self._part(self._echo, None, None)] if self._echo else []

    def add(self, event: Event) -> list[dict[str, Any]]:
        self._text.append(event.text)
        self._finish = event.finish
        found = self._log_probs and self._log_probs.add(without_end(event, self._tokenizer))
        nothing = not event.text and event.finish is None and not (found and found["tokens"])
        return [] if nothing else [self._part(event.text, found, event.finish)]

    def whole(self) -> dict[str, Any]:
        return self._part("".join(self._text), self._log_probs and self._log_probs.all, self._finish)

    def _part(self, text: str, log_probs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": log_probs, "finish_reason": finish}


class _LogProbs:
    """Log-probabilities in the form of completions: a list for each kind of value."""

    def __init__(self, tokenizer: AbstractTokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, after=prompt)
        self._offset = 0
        self.all: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, log_probs: Sequence[LogProb]) -> dict[str, Any]:
        new: dict[str, Any] = {name: [] for name in self.all}
        for one in log_probs:
            new["tokens"].append(self._tokenizer.token_name(one.id))
            new["token_logprobs"].append(clamped(one.log_prob))
            top = {self._tokenizer.token_name(id): clamped(log_prob) for id, log_prob in one.top}
            new["top_logprobs"].append(top)
            new["text_offset"].append(self._offset)
            self._offset += len(self._detokenizer.push(one.id))
        for name, values in new.items():
            self.all[name] += values
        return new
