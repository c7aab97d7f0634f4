"""Conversations as text and as token ids."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, overload

from ..documents import shown
from ..errors import InputError
from .instruct import encode_instruct
from .json_types import to_json_types
from .templates import render
from .tokenizer import AbstractTokenizer
from .tools import Tools, checked_schema, checked_tools


Messages: TypeAlias = Sequence[Mapping[str, Any]]

# A rendered conversation: text of a template, or ids of a Mistral release, which has no text form.
Rendered = TypeVar("Rendered", str, list[int])

# Keys for the reasoning that precedes an answer, the usual key first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_chat(
    tokenizer: AbstractTokenizer,
    messages: Messages,
    *,
    tools: Tools | None = None,
    reasoning_effort: str | None = None,
    json_schema: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Renders a conversation as text with the tokenizer's chat template.

    A template comes with a checkpoint and is not trusted: it runs in a sandbox with limits of time and memory. It gets
    the same variables as in transformers: `messages`, `tools`, `add_generation_prompt`, `bos_token` and the other
    tokens that the tokenizer's files name. If there is a template named `tool_use`, it is used whenever `tools` are
    given, as in transformers.

    **Arguments:**

    - `tokenizer`: the tokenizer with the chat template.
    - `messages`: in order, each a dict with `"role"` (`"system"`, `"user"`, `"assistant"` or `"tool"`) and
        `"content"`. An assistant's message may have `"tool_calls"` and `"reasoning_content"`, as from
        [`mistral_eqx.Reply.message`][]; a tool's message has the `"tool_call_id"` of the call that it answers. A key
        with the value `None` is treated as absent.
    - `tools`: the tools that the model may call, each a dict `{"type": "function", "function": {"name": ...,
        "description": ..., "parameters": ...}}`, where `parameters` is a JSON schema of an object.
    - `reasoning_effort`: how much the model reasons, such as `"low"`, if the template has this variable.
    - `json_schema`: the JSON schema of the answer, if the template has the variable `response_format`. The model is
        told of it; nothing forces the answer to follow it.
    - `add_generation_prompt`: whether to end the text with the header of the assistant's next answer.

    **Returns:** the text, with the names of control tokens.

    **Raises:** `InputError` if the tokenizer has no template, the template is invalid or forbidden, or the template
    refuses the messages; if a message has an image, audio or a file; also if a tool has another form, or the template
    has no use for `tools`, `reasoning_effort` or `json_schema`.
    """
    given = _given(messages, tools, reasoning_effort, json_schema)
    if _template(tokenizer, given) is None:
        remedy = "encode_chat gives the ids directly" if tokenizer.release_file else _REMEDY
        raise InputError(f"{tokenizer.name} has no chat template; {remedy}.")
    _check_used(tokenizer, given)
    return _render(tokenizer, given, add_generation_prompt)


@overload
def encode_chat(
    tokenizer: AbstractTokenizer,
    messages: Messages,
    *,
    tools: Tools | None = None,
    reasoning_effort: str | None = None,
    json_schema: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    assistant_mask: Literal[False] = False,
) -> list[int]: ...


@overload
def encode_chat(
    tokenizer: AbstractTokenizer,
    messages: Messages,
    *,
    tools: Tools | None = None,
    reasoning_effort: str | None = None,
    json_schema: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    assistant_mask: Literal[True],
) -> tuple[list[int], list[bool]]: ...


def encode_chat(
    tokenizer: AbstractTokenizer,
    messages: Messages,
    *,
    tools: Tools | None = None,
    reasoning_effort: str | None = None,
    json_schema: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    assistant_mask: bool = False,
) -> list[int] | tuple[list[int], list[bool]]:
    """Encodes a conversation as token ids.

    Only the template can produce control tokens: the name of one in a message or a tool, such as `<|im_end|>`, is
    encoded as plain text. Mistral's release files have no template; mistral-common encodes their format.

    **Arguments:** as of [`mistral_eqx.text.render_chat`][], and

    - `assistant_mask`: whether to also return a mask of the assistant's tokens. If the template has the tags
        `{% generation %}` and `{% endgeneration %}`, these are the tokens that overlap the text between the tags.
        Otherwise these are the tokens that each answer adds to its prompt; prompt and answer are then encoded
        separately, as in generation.

    **Returns:** the ids. They start with the beginning-of-sequence token only if the template writes it. With
    `assistant_mask`, the ids and a list of booleans of the same length.

    **Raises:** `InputError` as from `render_chat`, for Mistral's release files if their version has no such message,
    tool or setting; with `assistant_mask` also if the assistant has no tokens, or if the template changes earlier
    messages when later ones follow.
    """
    given = _given(messages, tools, reasoning_effort, json_schema)
    if _template(tokenizer, given) is None:
        return _encode_release(tokenizer, given, assistant_mask)
    _check_used(tokenizer, given)
    chat = _render_segments(tokenizer, given, add_generation_prompt)
    if not assistant_mask:
        return tokenizer.encode_segments(chat.contents)
    if _has_generation(tokenizer, given):
        ids, mask = _mask_overlap(tokenizer, chat)
    else:
        turns = _turns(given, chat.text, lambda some, prompt: _render_segments(tokenizer, some, prompt).text)
        ids, mask = _mask_spans(tokenizer, chat, turns)
    if not any(mask):
        raise InputError("The assistant's messages have no tokens, so there is nothing to learn; give an answer.")
    return ids, mask


_REMEDY = "give a folder or .gguf of an instruction-tuned model, or add a chat_template.jinja to the tokenizer's folder"


def _given(
    messages: Messages, tools: Tools | None, reasoning_effort: str | None, json_schema: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The variables of a template that come from the caller, in JSON types; settings only if they are given."""
    given: dict[str, Any] = {"messages": _converted(messages), "tools": checked_tools(tools)}
    if reasoning_effort is not None:
        given["reasoning_effort"] = reasoning_effort
    if json_schema is not None:
        schema = {"name": "answer", "schema": checked_schema(json_schema)}
        given["response_format"] = {"type": "json_schema", "json_schema": schema}
    return given


def _template(tokenizer: AbstractTokenizer, given: Mapping[str, Any]) -> str | None:
    """The template for what is given, if there is one: as in transformers, that for tools even if there are none."""
    has_tools = given["tools"] is not None and tokenizer.tool_template is not None
    return tokenizer.tool_template if has_tools else tokenizer.chat_template


# The argument and the remedy for each variable that a template need not have.
_OPTIONAL = {
    "tools": ("tools", "describe them in a system message instead"),
    "reasoning_effort": ("reasoning_effort", "leave it out"),
    "response_format": ("json_schema", "describe it in a system message instead"),
}


def _check_used(tokenizer: AbstractTokenizer, given: dict[str, Any]):
    """Refuses tools and settings that the template would silently ignore."""
    for variable, (name, remedy) in _OPTIONAL.items():
        if given.get(variable) and variable not in (_template(tokenizer, given) or ""):
            raise InputError(f"The chat template of {tokenizer.name} has no use for {name}; {remedy}.", key=name)


def _encode_release(
    tokenizer: AbstractTokenizer, given: dict[str, Any], assistant_mask: bool
) -> list[int] | tuple[list[int], list[bool]]:
    file = tokenizer.release_file
    if file is None:
        raise InputError(f"{tokenizer.name} has no chat template; {_REMEDY}.")
    ids = encode_instruct(file, **given)
    if not assistant_mask:
        return ids
    turns = _turns(given, ids, lambda some, prompt: encode_instruct(file, **some))
    return ids, [any(start <= at < stop for start, stop in turns) for at in range(len(ids))]


def _turns(
    given: dict[str, Any], whole: Rendered, render_some: Callable[[dict[str, Any], bool], Rendered]
) -> list[tuple[int, int]]:
    """The span of each of the assistant's messages in the rendered conversation: what it adds to its prompt."""
    messages = given["messages"]
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant" and number > 0]
    if not numbers:
        raise InputError("No message after the first is the assistant's, so there is nothing to learn; give an answer.")
    turns: list[tuple[int, int]] = []
    for number in numbers:
        before = render_some({**given, "messages": messages[:number]}, True)
        after = render_some({**given, "messages": messages[: number + 1]}, False)
        if after[: len(before)] != before or whole[: len(after)] != after:
            raise InputError(
                f"The chat template changes the messages up to message {number} when later messages follow, so the "
                "assistant's tokens cannot be identified; train on each answer as a separate conversation, or use a "
                "template that only appends.",
                key="messages",
            )
        turns.append((len(before), len(after)))
    return turns


@dataclasses.dataclass(frozen=True)
class _Segment:
    """A segment of a text: plain text, or the id of a control token that the template itself wrote."""

    start: int
    stop: int
    content: str | int


@dataclasses.dataclass(frozen=True)
class _Chat:
    """A rendered conversation.

    **Attributes:**

    - `text`: the whole text.
    - `segments`: its segments, in order.
    - `generated`: the start and the end of each generation block.
    """

    text: str
    segments: list[_Segment]
    generated: list[tuple[int, int]]

    @property
    def contents(self) -> Iterator[str | int]:
        """The segments in the form of `AbstractTokenizer.encode_segments`."""
        return (segment.content for segment in self.segments)


def _mask_spans(
    tokenizer: AbstractTokenizer, chat: _Chat, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """The ids, and a mask of those in the spans. Each span is encoded separately."""
    ids: list[int] = []
    mask: list[bool] = []
    cuts = sorted({cut for span in spans for cut in span})
    for segment in chat.segments:
        bounds = [segment.start, *(cut for cut in cuts if segment.start < cut < segment.stop), segment.stop]
        whole = isinstance(segment.content, int)
        for start, stop in [(segment.start, segment.stop)] if whole else itertools.pairwise(bounds):
            content = segment.content if isinstance(segment.content, int) else chat.text[start:stop]
            ids += _encode(tokenizer, content, first=not ids)
            mask += [any(first <= start < last for first, last in spans)] * (len(ids) - len(mask))
    return ids, mask


def _mask_overlap(tokenizer: AbstractTokenizer, chat: _Chat) -> tuple[list[int], list[bool]]:
    """The ids, and a mask of those that overlap the template's generation blocks."""
    ids: list[int] = []
    mask: list[bool] = []
    for segment in chat.segments:
        new = _encode(tokenizer, segment.content, first=not ids)
        stops = [segment.stop] * len(new)
        if isinstance(segment.content, str):
            sizes = [len(tokenizer.token_bytes(id, first=not ids and at == 0)) for at, id in enumerate(new)]
            stops = _token_stops(segment, list(itertools.accumulate(sizes)))
            if stops is None:
                # The tokenizer normalises texts, so its tokens cannot be aligned with this one.
                return _mask_spans(tokenizer, chat, chat.generated)
        starts = [segment.start, *stops[:-1]]
        ids += new
        mask += [
            any(start < last and stop > first for first, last in chat.generated)
            for start, stop in zip(starts, stops, strict=True)
        ]
    return ids, mask


def _token_stops(segment: _Segment, ends: list[int]) -> list[int] | None:
    """The position in the text after each token of a segment; `None` if the tokens do not have the text's bytes."""
    content = str(segment.content)
    offsets = list(itertools.accumulate((len(character.encode()) for character in content), initial=0))
    if not ends or ends[-1] != offsets[-1]:
        return None
    stops: list[int] = []
    at = 0
    for end in ends:
        while offsets[at] < end:
            at += 1
        stops.append(segment.start + at)
    return stops


def _encode(tokenizer: AbstractTokenizer, content: str | int, first: bool) -> list[int]:
    """The ids of a segment. Without `first`, it is encoded as if it followed another segment."""
    return tokenizer.encode_segments([content]) if first else tokenizer.encode_segments([0, content])[1:]


def _has_generation(tokenizer: AbstractTokenizer, given: Mapping[str, Any]) -> bool:
    return "endgeneration" in (_template(tokenizer, given) or "")


@dataclasses.dataclass(frozen=True)
class _Name:
    """The name of a control token in a text, with the white space that it strips, and whether it is from a message."""

    name: str
    start: int
    stop: int
    of_message: bool


def _render_segments(tokenizer: AbstractTokenizer, given: dict[str, Any], add_generation_prompt: bool) -> _Chat:
    """Renders a conversation, and distinguishes the template's control tokens from their names in messages and tools.

    For this, the template renders the messages a second time, with marks around the names of control tokens. Marks can
    change the result of stripping or searching in the template. So the text is taken from the first rendering, and
    only the origin of each name from the second, unless the names in both cannot be matched.
    """
    begin, end, left, right = _unused_characters(given, _template(tokenizer, given) or "", 4)
    generation = {"generation_start": begin, "generation_end": end} if _has_generation(tokenizer, given) else {}
    text, marks = _remove_marks(_render(tokenizer, given, add_generation_prompt, generation), begin + end)
    names = list(_names(tokenizer, text, 0, len(text)))
    mark = _marker(tuple(tokenizer.control_tokens))
    marked = {name: _marked(value, mark, left, right) for name, value in given.items()}
    if marked != given:
        raw = _render(tokenizer, marked, add_generation_prompt, generation)
        other_text, other_marks = _remove_marks(raw, begin + end + left + right)
        found = _names_between(tokenizer, other_text, other_marks, left, right)
        owned = _with_owners(names, found)
        if owned is not None:
            names = owned
        else:
            text, names = other_text, found
            marks = [(at, mark) for at, mark in other_marks if mark in begin + end]
    opened = [at for at, mark in marks if mark == begin]
    closed = [at for at, mark in marks if mark == end]
    if len(opened) != len(closed):
        raise InputError(
            f"The chat template of {tokenizer.name} truncates its generation blocks, so the assistant's tokens cannot "
            "be identified; use another template.",
            key="chat_template",
        )
    return _Chat(text, list(_split(tokenizer, text, names)), list(zip(opened, closed, strict=True)))


def _names(tokenizer: AbstractTokenizer, text: str, start: int, stop: int) -> Iterator[_Name]:
    for match in tokenizer.control_pattern.finditer(text, start, stop):
        yield _Name(match[match.lastindex or 0], match.start(), match.end(), False)


def _names_between(
    tokenizer: AbstractTokenizer, text: str, marks: list[tuple[int, str]], left: str, right: str
) -> list[_Name]:
    """The names in a text with marks. No name crosses a mark; names between two marks are from messages."""
    borders = [(0, right), *((at, mark) for at, mark in marks if mark in left + right), (len(text), left)]
    found: list[_Name] = []
    for (start, opening), (stop, closing) in itertools.pairwise(borders):
        name = text[start:stop]
        if (opening, closing) == (left, right) and name in tokenizer.control_tokens:
            found.append(_Name(name, start, stop, True))
        else:
            found += _names(tokenizer, text, start, stop)
    return found


def _with_owners(names: list[_Name], found: list[_Name]) -> list[_Name] | None:
    """The names with their origin in the marked text, matched by order or, if the order differs, by name.

    **Returns:** `None` if the origin of a name is ambiguous.
    """
    if [each.name for each in names] == [each.name for each in found]:
        owners = [each.of_message for each in found]
    else:
        known: dict[str, set[bool]] = {}
        for each in found:
            known.setdefault(each.name, set()).add(each.of_message)
        if any(len(known.get(each.name, ())) != 1 for each in names):
            return None
        owners = [True in known[each.name] for each in names]
    return [dataclasses.replace(name, of_message=owner) for name, owner in zip(names, owners, strict=True)]


def _split(tokenizer: AbstractTokenizer, text: str, names: list[_Name]) -> Iterator[_Segment]:
    end = 0
    for name in names:
        if not name.of_message:
            if end < name.start:
                yield _Segment(end, name.start, text[end : name.start])
            yield _Segment(name.start, name.stop, tokenizer.control_tokens[name.name])
            end = name.stop
    if end < len(text):
        yield _Segment(end, len(text), text[end:])


def _remove_marks(text: str, marks: str) -> tuple[str, list[tuple[int, str]]]:
    """The text without marks, and the position of each mark. Marks may be escaped as in JSON."""
    for mark in marks:
        text = text.replace(_escaped(mark), mark)
    pieces = re.split(f"([{marks}])", text)
    lengths = itertools.accumulate(map(len, pieces[::2]))
    return "".join(pieces[::2]), list(zip(lengths, pieces[1::2], strict=False))


@functools.lru_cache(maxsize=8)
def _marker(names: tuple[str, ...]) -> Callable[[str, str, str], str]:
    """Makes a function that puts marks around names in a text, and a mark after an incomplete name at its end."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    beginnings = {name[:length] for name in names for length in range(1, len(name))}
    beginnings = {beginning for beginning in beginnings if not beginning.isspace()}
    longest = max(map(len, names), default=0)

    def mark(text: str, left: str, right: str) -> str:
        marked = pattern.sub(lambda name: f"{left}{name[0]}{right}", text)
        # The following text must not complete the name.
        begun = any(text[-length:] in beginnings for length in range(1, min(longest, len(text) + 1)))
        return marked + right if begun else marked

    return mark


def _marked(value: Any, mark: Callable[[str, str, str], str], left: str, right: str) -> Any:
    """Marks each string in a JSON value, keys included."""
    if isinstance(value, list):
        return [_marked(inner, mark, left, right) for inner in value]
    if isinstance(value, dict):
        return {mark(key, left, right): _marked(inner, mark, left, right) for key, inner in value.items()}
    return mark(value, left, right) if isinstance(value, str) else value


def _converted(messages: Messages) -> list[dict[str, Any]]:
    """Converts messages to JSON types.

    As in transformers, keys with the value null are dropped, and reasoning is given under each of its usual keys.
    """
    if not messages:
        raise InputError("The conversation is empty; give at least one message.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"Each message must be a dict with 'role' and 'content', not {shown(message)}.")
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    converted = to_json_types(given, "The messages")
    for number, message in enumerate(converted):
        _check_is_text(number, message)
    return [_with_reasoning(message) for message in converted]


# Types of parts that are not text, such as `image_url` and `input_audio`, and keys that hold such content.
_NOT_TEXT = re.compile("(input_)?(image|audio|video|file)(s|_url)?")


def _check_is_text(number: int, message: dict[str, Any]):
    """Refuses what only an encoder of images or audio could read; a template might ignore it."""
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    named = [*message, *(name for part in parts for name in (*part, part.get("type")) if isinstance(name, str))]
    if found := next(filter(_NOT_TEXT.fullmatch, named), None):
        raise InputError(
            f"Message {number} has the part {shown(found)}, but only text models are supported; leave out images, "
            "audio, video and files.",
            key="messages",
        )


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _unused_characters(given: dict[str, Any], template: str, count: int) -> list[str]:
    """Private-use characters that occur neither in the messages and tools nor in the template."""
    used = json.dumps(given, ensure_ascii=False) + template
    codes = itertools.chain(range(0xE000, 0xF8FF), range(0xF0000, 0xFFFFE))
    free = (mark for mark in map(chr, codes) if mark not in used and _escaped(mark) not in used)
    found = list(itertools.islice(free, count))
    if len(found) < count:
        raise InputError("The messages contain every private-use character; remove some of them.")
    return found


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


def _render(
    tokenizer: AbstractTokenizer,
    given: Mapping[str, Any],
    add_generation_prompt: bool,
    variables: Mapping[str, str] | None = None,
) -> str:
    return render(
        _template(tokenizer, given) or "",
        {
            "add_generation_prompt": add_generation_prompt,
            "documents": None,
            **tokenizer.template_tokens,
            **given,
            **(variables or {}),
        },
        f"The chat template of {tokenizer.name}",
    )
