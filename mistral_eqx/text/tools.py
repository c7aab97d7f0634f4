"""What a conversation gives a model besides messages: tools that it may call, and the schema of its answer."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jsonschema import Draft7Validator, SchemaError

from ..documents import shown
from ..errors import InputError
from .json_types import to_json_types


Tools: TypeAlias = Sequence[Mapping[str, Any]]


def checked_tools(tools: Tools | None) -> list[dict[str, Any]] | None:
    """Checks tools, and converts them to JSON types.

    **Arguments:**

    - `tools`: each a dict in OpenAI's form, `{"type": "function", "function": {"name": ..., "description": ...,
        "parameters": ...}}`. `parameters` is a JSON schema of an object; it and `description` may be absent.

    **Raises:** `InputError` if a tool has another form, if `parameters` is not a JSON schema (draft 7) of an object, or
    if two tools have the same name.
    """
    if tools is None:
        return None
    if isinstance(tools, str | Mapping):
        raise InputError(f"The tools must be a list of dicts, not {shown(tools)}.", key="tools")
    checked = [_checked(tool) for tool in to_json_types(list(tools), "The tools")]
    names = [tool["function"]["name"] for tool in checked]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"Two tools have the name {shown(twice)}; give each tool its own name.", key="tools")
    return checked


def _checked(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type") != "function":
        raise InputError(
            'Each tool must be a dict {"type": "function", "function": {"name": ..., "parameters": ...}}, '
            f"not {shown(tool)}.",
            key="tools",
        )
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not name:
        raise InputError(f"The name of a tool must be a text, not {shown(name)}.", key="tools")
    if not isinstance(description, str | None):
        raise InputError(f"The description of the tool {shown(name)} must be a text.", key="tools")
    if parameters is None:
        return tool
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise InputError(
            f"The parameters of the tool {shown(name)} must be a JSON schema of an object, such as "
            f'{{"type": "object", "properties": {{}}}}, not {shown(parameters)}.',
            key="tools",
        )
    _check_schema(parameters, f"The parameters of the tool {shown(name)} are", "tools")
    return tool


def checked_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the JSON schema (draft 7) of an answer, and converts it to JSON types.

    **Raises:** `InputError` if `schema` is not a JSON schema.
    """
    converted = to_json_types(dict(schema), "The values of json_schema")
    _check_schema(converted, "The json_schema is", "json_schema")
    return converted


def _check_schema(schema: dict[str, Any], subject: str, key: str):
    try:
        Draft7Validator.check_schema(schema)
    except SchemaError as error:
        where = ".".join(map(str, error.absolute_path)) or "its top"
        raise InputError(
            f"{subject} not a JSON schema: at {shown(where)}, {shown(error.message, 160)}.", key=key
        ) from error
