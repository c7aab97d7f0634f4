"""What a chat request demands of the form of its answer: JSON, or calls of tools."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..documents import shown
from ..errors import InputError
from ..text import AbstractTokenizer, Grammar
from ..text.grammar import json_rule
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

    @property
    def either(self) -> bool:
        """Whether the answer is JSON, or calls as the model writes them."""
        return self.grammar is not None and bool(self.tools) and not self.calls


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
    grammar = _grammar(tokenizer, schema, "response_format")
    return Constraint(tools, _either(tokenizer, schema, tools, asked) if tools else grammar)


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


def _either(
    tokenizer: AbstractTokenizer, schema: Mapping[str, Any], tools: Sequence[Mapping[str, Any]], asked: ChatRequest
) -> Grammar:
    """JSON of a schema, or calls of tools in one of the forms that [`mistral_eqx.ReplyParser`][] reads."""
    known, calls = tokenizer.control_tokens, _calls_schema(tools, asked)
    # What is wrong with these alone is said of them.
    _grammar(tokenizer, calls, "tools")

    def tag(name: str) -> str:
        return f"<[{known[name]}]>" if name in known else json.dumps(name)

    more = "+" if asked.parallel_tool_calls else ""
    rules = {
        "start": "answer | tagged",
        "answer": json_rule(schema),
        "tagged": f"(gap {tag('<tool_call>')} gap call gap {tag('</tool_call>')} gap){more}",
        "gap": r"/[ \n]{0,2}/",
        "call": json_rule({**calls["items"], "$defs": calls["$defs"]}),
    }
    if "[TOOL_CALLS]" in known:
        rules["start"] += " | listed"
        rules["listed"] = f"{tag('[TOOL_CALLS]')} gap {json_rule(calls)}"
    if "[TOOL_CALLS]" in known and "[ARGS]" in known:
        id = f"({tag('[CALL_ID]')} /[A-Za-z0-9]{{9}}/)?" if "[CALL_ID]" in known else ""
        names = [json.dumps(str(_function(tool).get("name"))) for tool in tools]
        rules["start"] += " | named"
        rules["named"] = f"({tag('[TOOL_CALLS]')} ({' | '.join(f'named{at}' for at in range(len(tools)))})){more}"
        rules |= {
            f"named{at}": f"{name} {id} {tag('[ARGS]')} {json_rule(_parameters(tool))}"
            for at, (name, tool) in enumerate(zip(names, tools, strict=True))
        }
    try:
        return Grammar.lark(tokenizer, "\n".join(f"{name}: {rule}" for name, rule in rules.items()))
    except InputError as error:
        raise of_input(error, "tools") from None


def _parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    return _function(tool).get("parameters") or {"type": "object"}


def _calls_schema(tools: Sequence[Mapping[str, Any]], asked: ChatRequest) -> dict[str, Any]:
    """The schema of a list of calls of these tools."""
    definitions = {
        f"tool{number}": _moved(_parameters(tool), f"#/$defs/tool{number}") for number, tool in enumerate(tools)
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
