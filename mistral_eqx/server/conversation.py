"""Messages in OpenAI's form, as the text room takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..documents import parse_json, shown
from ..errors import InputError
from ..text import AbstractTokenizer, encode_chat
from .errors import of_input, refused


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking"}


def encode_messages(
    tokenizer: AbstractTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reasoning_effort: str | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Encodes a conversation as token ids.

    **Raises:** `ApiError` that names the parameter.
    """
    converted = [_converted(number, message) for number, message in enumerate(messages)]
    try:
        return encode_chat(
            tokenizer,
            converted,
            tools=tools or None,
            reasoning_effort=reasoning_effort,
            add_generation_prompt=add_generation_prompt,
        )
    except InputError as error:
        raise of_input(error, "messages") from None


def _converted(number: int, message: Mapping[str, Any]) -> dict[str, Any]:
    place = f"messages[{number}]"
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise refused(f"{place}.role is {shown(role)}; it must be one of {', '.join(_ROLES)}.", f"{place}.role")
    # An answer of this server or of OpenAI's, sent back, has more keys with nothing in them.
    given = {key: value for key, value in message.items() if value not in (None, [], {})}
    for key in given:
        if key not in _KEYS:
            name = f"{place}.{key}" if key.isidentifier() else place
            raise refused(f"{place} has {shown(key)}, which this server does not read; leave it out.", name)
    given["role"] = _ROLES[role]
    if "content" in given:
        given["content"] = _text(given["content"], f"{place}.content")
    elif not given.get("tool_calls"):
        raise refused(f"{place}.content is missing; give a text.", f"{place}.content")
    if "tool_calls" in given:
        given["tool_calls"] = _calls(given["tool_calls"], f"{place}.tool_calls")
    return given


def _text(content: Any, place: str) -> Any:
    """A content of nothing but text as one text, which is what most templates can write."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refused(f"{place} must be a text, or a list of parts.", place)
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise refused(f'{place} has a part that is not like {{"type": "text", "text": ...}}.', place)
        if part["type"] != "text":
            kind = shown(part["type"])
            raise refused(f"{place} has a part of type {kind}; only text is supported, so leave it out.", place)
        if not isinstance(part.get("text"), str):
            raise refused(f"{place} has a text part whose text is {shown(part.get('text'))}; give a text.", place)
    return "\n".join(part["text"] for part in content)


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls with arguments as objects: in OpenAI's form they are JSON in a text."""
    if not isinstance(calls, list):
        raise refused(f"{place} must be a list.", place)
    return [_call(call, f"{place}[{number}]") for number, call in enumerate(calls)]


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise refused(
            f'{place} must be like {{"id": ..., "type": "function", "function": {{"name": ..., "arguments": ...}}}}.',
            place,
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments, f"{place}.function.arguments", remedy="send the model's arguments")
        except InputError as error:
            raise of_input(error, place) from None
    if not isinstance(arguments, dict):
        raise refused(f"{place}.function.arguments must be a JSON object.", place)
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **found} if isinstance(call.get("id"), str) else found
