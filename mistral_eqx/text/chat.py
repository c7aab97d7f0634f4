"""Conversations as text and as token ids."""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..errors import InputError
from .instruct import encode_instruct
from .tokenizer import AbstractTokenizer


Messages = Sequence[Mapping[str, Any]]


def render_chat(tokenizer: AbstractTokenizer, messages: Messages, *, add_generation_prompt: bool = True) -> str:
    """A conversation as the text that the model was trained on.

    The template runs in a sandbox: it comes with a checkpoint, and may be anyone's.

    **Arguments:**

    - `tokenizer`: its chat template is used.
    - `messages`: in order, each a dict with `"role"` (`"system"`, `"user"` or `"assistant"`) and `"content"`.
    - `add_generation_prompt`: whether the text ends where the assistant's answer starts.

    **Returns:** text with the names of control tokens in it.

    **Raises:** `ValueError` if there is no template, the template is wrong or forbidden, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        remedy = "encode_chat gives the ids directly" if tokenizer.release_file else _REMEDY
        raise InputError(f"{tokenizer.name} has no chat template; {remedy}.")
    return _render(tokenizer, _plain(messages), add_generation_prompt)


def encode_chat(tokenizer: AbstractTokenizer, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]:
    """A conversation as token ids.

    Only the template can write control tokens: a message that has the name of one, such as `<|im_end|>`, is encoded
    as those letters. Mistral's release files have no template, and mistral-common knows their format.

    **Arguments:** as of [`mistral_eqx.text.render_chat`][].

    **Returns:** the ids. The beginning of the text is there if the template writes it.

    **Raises:** `ValueError` as `render_chat` does, but not for Mistral's release files.
    """
    messages = _plain(messages)
    if tokenizer.chat_template is None and tokenizer.release_file is not None:
        return encode_instruct(tokenizer.release_file, messages)
    if tokenizer.chat_template is None:
        raise InputError(f"{tokenizer.name} has no chat template; {_REMEDY}.")
    mark = _unused_character(messages, tokenizer.chat_template)
    shielded = _shield(messages, tokenizer, mark)
    segments = tokenizer.segments(_render(tokenizer, shielded, add_generation_prompt))
    return tokenizer.encode_segments(
        # A template may have written the mark as JSON does.
        segment.replace(mark, "").replace(_escaped(mark), "") if isinstance(segment, str) else segment
        for segment in segments
    )


_REMEDY = "give a folder or .gguf of an instruction-tuned model, or put a chat_template.jinja beside its tokenizer"


def _plain(messages: Messages) -> list[dict[str, Any]]:
    """The messages as nothing but JSON's types, so that a template can call no method of a user's object."""
    if not messages:
        raise InputError("The conversation is empty; give at least one message.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"Each message must be a dict with 'role' and 'content', not {message!r}.")
    try:
        return json.loads(json.dumps([dict(message) for message in messages]))
    except TypeError as error:
        raise InputError(f"The messages must consist of text, numbers, lists and dicts: {error}.") from error


def _unused_character(messages: list[dict[str, Any]], template: str) -> str:
    """A character for private use that nobody uses here."""
    used = json.dumps(messages, ensure_ascii=False) + template
    marks = map(chr, range(0xE000, 0xF8FF))
    return next(mark for mark in marks if mark not in used and _escaped(mark) not in used)


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


def _shield(value: Any, tokenizer: AbstractTokenizer, mark: str) -> Any:
    """Puts `mark` into each name of a control token, and after the beginning of one at the end of a text.

    The text stays as it was otherwise, so that a template that looks at it does as it would have done.
    """
    if isinstance(value, list):
        return [_shield(inner, tokenizer, mark) for inner in value]
    if isinstance(value, dict):
        return {key: _shield(inner, tokenizer, mark) for key, inner in value.items()}
    if not isinstance(value, str):
        return value
    names = tokenizer.control_tokens
    for name in sorted((name for name in names if name in value), key=len, reverse=True):
        value = value.replace(name, name[0] + mark + name[1:])
    begun = any(value.endswith(name[:length]) for name in names for length in range(1, len(name)))
    return value + mark if begun else value


def _render(tokenizer: AbstractTokenizer, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    def text(id: int | None) -> str:
        return "" if id is None else tokenizer.token_bytes(id, first=True).decode(errors="replace")

    template = f"The chat template of {tokenizer.name}"
    try:
        return _compiled(tokenizer.chat_template or "").render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=text(tokenizer.bos_id),
            eos_token=text(next(iter(tokenizer.eos_ids), None)),
            tools=None,
            documents=None,
        )
    except _Refusal as error:
        raise InputError(f"{template} refuses these messages: {_sentence(error)}") from error
    except TemplateSyntaxError as error:
        raise InputError(f"{template} is no valid jinja2 (line {error.lineno}): {_sentence(error)}") from error
    except SecurityError as error:
        raise InputError(f"{template} does what no chat template may do: {_sentence(error)}") from error
    except Exception as error:  # a template is a program, and may fail in any way
        raise InputError(
            f"{template} cannot be applied to these messages: {type(error).__name__}: {_sentence(error)}"
        ) from error


def _sentence(error: Exception) -> str:
    """What an error says on one line, with one full stop."""
    return " ".join(str(error).split()).rstrip(".") + "."


class _Refusal(TemplateError):
    """A template's own objection."""


class _Namespace(Namespace):
    """A namespace without hidden names, which the sandbox would not watch."""

    def __init__(*args: Any, **kwargs: Any):  # `self` may be one of the names
        self, *rest = args
        Namespace.__init__(self, *rest, **kwargs)
        for name in dict(*rest, **kwargs):
            _check_visible(name)

    def __setitem__(self, name: str, value: Any):
        _check_visible(name)
        Namespace.__setitem__(self, name, value)


def _check_visible(name: Any):
    if str(name).startswith("_"):
        raise SecurityError(f"it sets {name!r} on a namespace.")


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox that refuses a forbidden name where it is used, not only what is done with it."""

    def unsafe_undefined(self, obj: Any, attribute: str):
        raise SecurityError(f"it uses {attribute!r} of a {type(obj).__name__}.")


class _Generation(Extension):
    """Lets templates mark what the assistant says; the marks change nothing."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _refuse(message: str):
    raise _Refusal(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as such; jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
