"""The engine: many requests in one batch, each with the tokens that it would get alone."""

import dataclasses
from collections.abc import Iterable, Mapping

from ..config import MistralConfig
from ..nn import Mistral
from ..text import AbstractTokenizer
from .answer import Answer, Event
from .request import Request


class Full(RuntimeError):
    """The queue of an engine is full; try again later."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What an engine is doing, and what it has done.

    **Attributes:**

    - `active`: rows that decode.
    - `waiting`: requests that wait for a row, or whose prompt is prefilled.
    - `slots`: the size of the KV cache in tokens of each row.
    - `prompt_tokens`, `cached_tokens`, `new_tokens`: totals; `cached_tokens` are those of prompts that came out of the
        prefix cache.
    - `finished`: the number of answers that ended, by their `finish`.
    """

    active: int
    waiting: int
    slots: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    finished: Mapping[str, int]


class Engine:
    """INTERFACE ONLY, being written: the calls below are those that other rooms may use."""

    def __init__(
        self,
        model: Mistral,
        tokenizer: AbstractTokenizer,
        *,
        rows: int = 8,
        context: int | None = None,
        chunk: int = 256,
        queue: int = 256,
        prefix_cache: int = 2**30,
        cache_dtype: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.config: MistralConfig = model.config
        self.rows = rows
        self.context: int = context or 4096  # the most tokens of a prompt and its answer together

    def submit(self, request: Request) -> Answer:
        """Thread-safe and quick. Raises `InputError` for a request that cannot be, `Full` if the queue is full."""
        raise NotImplementedError

    def run(self, requests: Iterable[Request]) -> list[Event]:
        """Answers all requests, and returns one joined event for each, in order."""
        raise NotImplementedError

    @property
    def load(self) -> Load:
        """What the engine is doing."""
        raise NotImplementedError

    def close(self, *, drain: bool = False):
        """Ends the worker thread: cancels what runs or, with `drain`, waits for it. Used as a context manager too."""
        raise NotImplementedError

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object):
        self.close()
