"""Errors in the form of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..engine import Full
from ..errors import InputError, one_line


INVALID = "invalid_request_error"
# A second try of these would cost the same time again, and the official clients try twice unless they are asked not to.
NO_SECOND_TRY = {"x-should-retry": "false"}
# Names of the engine and of the text room, and the parameters that they come from.
_PARAMETERS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "eos_ids": "ignore_eos",
    "json_schema": "response_format",
    "grammar": "response_format",
    "adapter": "model",
}


class ApiError(Exception):
    """An answer that is an error.

    **Attributes:**

    - `status`: the HTTP status.
    - `headers`: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self._error = {"message": one_line(message), "type": kind, "param": param, "code": code}

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        return {"error": self._error}


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error of the client."""
    return ApiError(400, message, param=param, code=code)


def internal() -> ApiError:
    """A fault of the server; what it was is in the server's log alone."""
    return ApiError(500, "The server has a fault; its log says which.", kind="server_error", code="internal_error")


def of_input(error: InputError, param: str | None = None) -> ApiError:
    """An `InputError` about a parameter; about `param` unless the error names another."""
    key = _PARAMETERS.get(error.key or "", error.key) if error.file is None else None
    return refused(str(error), param=key or param)


def of_full(error: Full) -> ApiError:
    """A full queue: the official clients wait as long as the header says, and try again."""
    message = f"{str(error).rstrip('.') or 'The queue is full'}; try again later."
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers={"Retry-After": "2"})


def of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    wrong = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message = wrong["msg"].removeprefix("Value error, ")
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in wrong["loc"]).lstrip(".")
    if wrong["type"] == "extra_forbidden":
        return refused(f"{place} is no parameter of this server; leave it out.", place, "unsupported_parameter")
    if wrong["type"] == "missing":
        return refused(f"{place} is missing; give it.", place, "missing_required_parameter")
    if not place:  # several parameters that do not fit together; the message begins with the first
        return refused(f"{message}.", message.split()[0], "invalid_value")
    return refused(f"{place} is wrong: {message}.", place, "invalid_value")
