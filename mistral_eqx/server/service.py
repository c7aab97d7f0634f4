"""What all endpoints share: the engine, its names, and limits."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

from ..engine import Answer, Engine, Full, Request
from ..errors import InputError
from ..text import AbstractTokenizer
from .errors import ApiError, of_full, of_input, refused
from .metrics import Metrics


LOG = logging.getLogger("mistral_eqx.server")
# No token has more characters. A text that no context of such tokens can hold is not encoded, which may take minutes.
_LONGEST_TOKEN = 1024


@dataclasses.dataclass
class Service:
    """**Attributes:**

    - `engine`: what answers.
    - `name`: the name of the model for clients.
    - `timeout`: the most seconds of a request.
    - `log_prompts`: whether the log has the prompts.
    - `draining`: whether the server ends, and takes no more requests.
    - `active`: how many HTTP requests run.
    - `created`: when the server started, in seconds since 1970.
    """

    engine: Engine
    name: str
    timeout: float
    log_prompts: bool
    draining: bool = False
    active: int = 0
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        self.metrics = Metrics(self.engine)

    @property
    def tokenizer(self) -> AbstractTokenizer:
        """The tokenizer of the engine."""
        return self.engine.tokenizer

    @property
    def names(self) -> tuple[str, ...]:
        """All that a request's `model` may be: the model, and the engine's adapters."""
        return (self.name, *self.engine.adapters)

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a request's `model` names; `None` for the model itself.

        **Raises:** `ApiError` if there is no such model.
        """
        if model is None or model == self.name:
            return None
        if model not in self.engine.adapters:
            message = f"There is no model {model!r} here; take one of {', '.join(map(repr, self.names))}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return model

    def check_size(self, content: Any, param: str):
        """Refuses a text or a conversation that is too long to be encoded.

        **Raises:** `ApiError`.
        """
        if len(str(content)) > _LONGEST_TOKEN * self.engine.context:
            raise refused(
                f"{param} is longer than this server's context of {self.engine.context} tokens; shorten it.",
                param,
                "context_length_exceeded",
            )

    def request(self, ids: Sequence[int], options: dict[str, Any], *, ignore_eos: bool, param: str) -> Request:
        """A request to the engine.

        **Raises:** `ApiError` that names `param` if the prompt is too long.
        """
        new, context = options["max_new_tokens"], self.engine.context
        if not ids:
            raise refused(f"{param} has no tokens; give a text.", param)
        if len(ids) + (new or 1) > context:
            raise refused(
                f"{param} has {len(ids)} tokens, which with {new or 1} new ones are more than this server's context of "
                f"{context}; shorten it, or ask for fewer.",
                param,
                "context_length_exceeded",
            )
        if new is not None and options["min_new_tokens"] > new:
            raise refused(f"min_tokens is {options['min_new_tokens']}; at most {new} are asked for.", "min_tokens")
        ends = () if ignore_eos else self.tokenizer.eos_ids or None
        try:
            return Request(ids, eos_ids=ends, timeout=self.timeout, **options)
        except InputError as error:
            raise of_input(error) from None

    def submit(self, requests: Sequence[Request], param: str) -> list[Answer]:
        """Gives requests to the engine: all or none.

        **Raises:** `ApiError` if the engine refuses one, or is full.
        """
        answers: list[Answer] = []
        try:
            for request in requests:
                answers.append(self.engine.submit(request))
        except Exception as error:
            for answer in answers:
                answer.cancel()
            if isinstance(error, Full):
                raise of_full(error) from None
            if isinstance(error, InputError):
                raise of_input(error, param) from None
            if isinstance(error, RuntimeError):
                self.report(error)
                message = "The engine is closed or has failed; /health says which."
                raise ApiError(503, message, kind="server_error", code="engine_unavailable") from None
            raise
        return answers

    def report(self, error: Exception):
        """Logs a fault: its kind and place, without its message, which may have a part of a prompt."""
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = "" if trace is None else f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        LOG.error("A fault: %s%s", type(error).__name__, place)
        LOG.debug("The traceback:", exc_info=error)
