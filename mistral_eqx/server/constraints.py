"""What a chat request demands of the form of its answer: JSON, or calls of tools."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..documents import shown
from ..errors import InputError
from ..text import AbstractTokenizer, Grammar
from .errors import of_input, refused
from .protocol import ChatRequest


@dataclasses.dataclass(frozen=True)
class Constraint:
    """**Attributes:**

    - `tools`: the tools that the model is told of.
    - `grammar`: what the answer must follow, if anything.
    - `calls`: whether the answer is a JSON list of calls.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    grammar: Grammar | None = None
    calls: bool = False


def constraint_of(asked: ChatRequest, tokenizer: AbstractTokenizer) -> Constraint:
    """The constraint of a request.

    **Raises:** `ApiError` that names the parameter.
    """
    schema = _schema(asked.response_format)
    tools, forced = _tools(asked)
    if forced is not None:
        if schema is not None:
            raise refused("response_format cannot be combined with a demanded call of a tool.", "response_format")
        return Constraint(tools, _grammar(tokenizer, _calls_schema(forced, asked), "tools"), calls=True)
    if schema is None:
        return Constraint(tools)
    if tools:
        raise refused(
            "response_format cannot be combined with tools that the model may call; set tool_choice to 'none'.",
            "response_format",
        )
    return Constraint(None, _grammar(tokenizer, schema, "response_format"))


def _schema(format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The JSON schema of a `response_format`; `None` if any text will do."""
    if format is None or format.get("type") == "text":
        return None
    kind = format.get("type")
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        wanted = "'text', 'json_object' or 'json_schema'"
        raise refused(f"response_format.type is {shown(kind)}; it must be {wanted}.", "response_format")
    wrapped = format.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    if not isinstance(schema, dict):
        raise refused(
            'response_format must be like {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}.',
            "response_format",
        )
    return schema


def _tools(asked: ChatRequest) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]] | None]:
    """The tools that the model is told of, and those of which one must be called, if any must."""
    tools, choice = asked.tools or None, asked.tool_choice
    if choice is None or choice == "auto":
        return tools, None
    if choice == "none":
        return None, None
    if tools is None:
        raise refused("tool_choice demands a tool, but there are no tools.", "tool_choice")
    if choice == "required":
        return tools, tools
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise refused(
            'tool_choice must be \'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": ...}}.',
            "tool_choice",
        )
    named = [tool for tool in tools if _function(tool).get("name") == name]
    if not named:
        raise refused(f"tool_choice names {shown(name)}, which is none of the tools.", "tool_choice")
    return tools, named


def _function(tool: Any) -> Mapping[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, dict) else {}


def _calls_schema(tools: Sequence[Mapping[str, Any]], asked: ChatRequest) -> dict[str, Any]:
    """The schema of a list of calls of these tools."""
    definitions = {
        f"tool{number}": _moved(_function(tool).get("parameters") or {"type": "object"}, f"#/$defs/tool{number}")
        for number, tool in enumerate(tools)
    }
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": _function(tool).get("name")},
                "arguments": {"$ref": f"#/$defs/tool{number}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    most = {} if asked.parallel_tool_calls else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most, "$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """A schema that is now at a place in another one: its references to itself begin there."""
    if isinstance(schema, list):
        return [_moved(entry, place) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, place)
        for key, value in schema.items()
    }


def _grammar(tokenizer: AbstractTokenizer, schema: Mapping[str, Any], param: str) -> Grammar:
    try:
        return Grammar.json_schema(tokenizer, schema)
    except InputError as error:
        raise of_input(error, param) from None
