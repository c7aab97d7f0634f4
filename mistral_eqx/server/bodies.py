"""JSON bodies: read with limits, and written."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from ..documents import parse_json
from ..errors import InputError
from .errors import ApiError, of_input, of_validation, refused


# Seconds that a body may take to come.
_PATIENCE = 30
# So many bytes past the limit are read and dropped: a client that still sends would see a reset, not the refusal.
_DROPPED = 16 * 2**20

Body = TypeVar("Body", bound=BaseModel)


class JsonResponse(Response):
    """JSON in ASCII, which can have any text of a model or a client, halves of characters too."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def dumps(content: Any) -> bytes:
    """JSON on one line."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def error_response(error: ApiError) -> Response:
    """An error as an answer."""
    return JsonResponse(error.body(), error.status, error.headers)


async def read_body(http: Request, kind: type[Body], limit: int) -> Body:
    """Reads and checks the body of an HTTP request.

    **Arguments:**

    - `limit`: the most bytes that it may have.

    **Raises:** `ApiError`.
    """
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # A page of another site can send any other type without the browser asking this server.
        raise ApiError(415, "The body must be JSON; set the header Content-Type: application/json.")
    length = http.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit + _DROPPED:
        raise _too_large(limit)
    content, size = bytearray(), 0
    try:
        async with asyncio.timeout(_PATIENCE):
            async for part in http.stream():
                size += len(part)
                if size <= limit:
                    content += part
                elif size > limit + _DROPPED:
                    break
    except ClientDisconnect:
        raise refused("The body ended too early.") from None
    except TimeoutError:
        raise ApiError(408, f"The body did not come within {_PATIENCE} s.", code="timeout") from None
    if size > limit:
        raise _too_large(limit)
    return await asyncio.to_thread(_checked, bytes(content), kind)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body has more than {limit:,} bytes; send less.", code="body_too_large")


def _checked(content: bytes, kind: type[Body]) -> Body:
    try:
        found = parse_json(content.decode(), "The body", remedy="send a JSON object")
    except UnicodeDecodeError as error:
        raise refused(f"The body is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    except InputError as error:
        raise of_input(error) from None
    if not isinstance(found, dict):
        raise refused("The body must be a JSON object.")
    try:
        # The official clients send null for what is not given.
        return kind.model_validate({key: value for key, value in found.items() if value is not None})
    except ValidationError as error:
        raise of_validation(error) from None


def described(kind: type[BaseModel]) -> dict[str, Any]:
    """The body for the OpenAPI document."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, list):
            return [inlined(entry) for entry in value]
        if not isinstance(value, Mapping):
            return value
        if isinstance(reference := value.get("$ref"), str):
            return inlined(definitions[reference.rpartition("/")[2]])
        return {key: inlined(entry) for key, entry in value.items()}

    content = {"application/json": {"schema": inlined(schema)}}
    return {"requestBody": {"required": True, "content": content}}
