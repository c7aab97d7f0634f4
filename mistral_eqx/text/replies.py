"""Replies of a model: text, reasoning and tool calls."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

from ..documents import parse_json
from ..errors import InputError
from .detokenizer import Detokenizer
from .tokenizer import AbstractTokenizer
from .tokens import Ids


# The end of reasoning by its begin.
_REASONING = {"[THINK]": "[/THINK]", "<think>": "</think>"}
_CALLS, _CALL_ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_CALL, _CALL_END = "<tool_call>", "</tool_call>"
# Tags that are text in most vocabularies; the others count only as control tokens.
_TAGS = ("<think>", "</think>", _CALL, _CALL_END)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    **Attributes:**

    - `name`: the name of the tool.
    - `arguments`: its arguments, of JSON types.
    - `id`: the id to answer with; `call00000`, `call00001`, ... if the model writes none.
    """

    name: str
    arguments: dict[str, Any]
    id: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply of a model, or what a part of it adds.

    **Attributes:**

    - `text`: the text for the user.
    - `reasoning`: the reasoning before it.
    - `tool_calls`: the calls of tools.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @staticmethod
    def join(parts: Iterable["Reply"]) -> "Reply":
        """The whole reply of its parts, in order."""
        parts = list(parts)
        return Reply(
            "".join(part.text for part in parts),
            "".join(part.reasoning for part in parts),
            tuple(call for part in parts for call in part.tool_calls),
        )

    def message(self) -> dict[str, Any]:
        """The reply as the assistant's message, for [`mistral_eqx.text.encode_chat`][]."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


def parse_reply(tokenizer: AbstractTokenizer, reply: Iterable[SupportsIndex] | str, *, after: Ids = ()) -> Reply:
    """Parses a reply into text, reasoning and tool calls.

    Reasoning is between `[THINK]` and `[/THINK]`, or between `<think>` and `</think>`. Tool calls have one of these
    forms; where the form or its JSON is wrong, the call stays text:

    - `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, of Mistral's versions 2 to 7;
    - `[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}` of version 11, and the same without `[CALL_ID]id` from version 13 on;
    - `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, also with a list of calls.

    Names in square brackets count only as control tokens of the tokenizer. Line breaks around `<...>` tags belong to
    the tags. Other control tokens are left out.

    **Arguments:**

    - `tokenizer`: the model's tokenizer.
    - `reply`: the new ids, or their text with the names of control tokens, as from `decode(ids, skip_special=False)`.
        Prefer ids: in a text, a name that the model spelled out counts as the control token.
    - `after`: the ids of the prompt. If they end with the begin of reasoning, so does the reply begin.

    **Returns:** the reply. Each text gives a reply; none is refused.

    **Raises:** `InputError` if an id is negative.
    """
    parser = ReplyParser(tokenizer, after=after)
    parts = [parser.push(piece) for piece in ([reply] if isinstance(reply, str) else reply)]
    return Reply.join([*parts, parser.flush()])


class ReplyParser:
    """Parses a reply piece by piece.

    The results of `push` and `flush` together are that of [`mistral_eqx.parse_reply`][], wherever the pieces end.

    ```python
    parser = mx.ReplyParser(tokenizer, after=ids)
    for token in conversation.reply(ids, max_new_tokens=256):
        print(parser.push(token).text, end="")
    print(parser.flush().text)
    ```
    """

    def __init__(self, tokenizer: AbstractTokenizer, *, after: Ids = ()):
        """**Arguments:** as of [`mistral_eqx.parse_reply`][]."""
        self._detokenizer = Detokenizer(tokenizer, after=after)
        self._control_names = {id: name for name, id in tokenizer.control_tokens.items()}
        self._special_ids = tokenizer.special_ids
        # Text of the tokenizer has tags that are text; a given text has also the names of control tokens.
        self._tags = _Scanner([tag for tag in _TAGS if tag not in tokenizer.control_tokens])
        self._names = _Scanner([*tokenizer.control_tokens, *_TAGS])
        prompt = tokenizer.decode([int(id) for id in after[-16:]], skip_special=False).rstrip() if len(after) else ""
        # The tag or control token that the text is in, if any.
        self._inside = next((begin for begin in _REASONING if prompt.endswith(begin)), None)
        self._skips = self._inside == "<think>"  # whether line breaks that follow belong to a tag
        self._breaks = ""  # line breaks that may belong to the next tag
        self._raw: list[str] = []  # the tool call so far, as it was written
        self._fields: list[tuple[str, list[str]]] = []  # its parts, each with the name before it
        self._calls = 0
        self._new: list[Reply] = []

    def push(self, piece: SupportsIndex | str) -> Reply:
        """Adds the next token, or the next text with the names of control tokens.

        **Returns:** what is new and certain; a tool call when it is complete.

        **Raises:** `InputError` if an id is negative.
        """
        if isinstance(piece, str):
            self._read(self._names.push(piece))
        elif (text := self._detokenizer.push(piece)) or int(piece) not in self._special_ids:
            self._read(self._tags.push(text))
        else:
            self._read(self._tags.flush())
            self._on_name(self._control_names.get(int(piece), ""))
        return self._taken()

    def flush(self) -> Reply:
        """Ends the reply, and returns the rest that was held back."""
        self._read(self._tags.push(self._detokenizer.flush()))
        self._read(self._tags.flush())
        self._read(self._names.flush())
        self._end_call()
        if not self._skips:
            self._add(self._breaks)
        self._breaks = ""
        return self._taken()

    def _taken(self) -> Reply:
        new, self._new = Reply.join(self._new), []
        return new

    def _read(self, found: Iterable[tuple[str, bool]]):
        for text, is_name in found:
            if is_name:
                self._on_name(text)
            elif text:
                self._on_text(text)

    def _on_text(self, text: str):
        if self._inside in (_CALLS, _CALL):
            self._raw.append(text)
            self._fields[-1][1].append(text)
            return
        if self._skips:
            text = text.lstrip("\n")
        if text:
            text = self._breaks + text
            kept = text.rstrip("\n")
            self._breaks, self._skips = text[len(kept) :], False
            self._add(kept)

    def _add(self, text: str):
        if text:
            self._new.append(Reply(reasoning=text) if self._inside in _REASONING else Reply(text=text))

    def _on_name(self, name: str):
        if self._inside == _CALL:
            if name == _CALL_END:
                self._raw.append(name)
                self._end_call()
            elif name in _TAGS:
                self._on_text(name)
        elif self._inside == _CALLS and name in (_CALL_ID, _ARGUMENTS):
            self._raw.append(name)
            self._fields.append((name, []))
        elif self._inside == _CALLS and name in _TAGS:
            self._on_text(name)
        elif self._inside in _REASONING and name == _REASONING[self._inside]:
            self._leave(drops_breaks=name == "</think>")
        elif self._inside in _REASONING and name in _TAGS:
            self._on_text(name)
        elif name in _REASONING or name in (_CALLS, _CALL):
            self._end_call()
            self._enter(name)
        elif name in _TAGS:
            self._on_text(name)  # an end without its begin

    def _enter(self, name: str):
        if name != _CALL:
            self._release()
        self._inside = name
        self._skips = self._skips if name == _CALL else name == "<think>"
        self._raw, self._fields = [name], [(name, [])]

    def _leave(self, *, drops_breaks: bool):
        if drops_breaks:
            self._breaks = ""
        self._release()
        self._inside, self._skips = None, drops_breaks

    def _release(self):
        self._add(self._breaks)
        self._breaks = ""

    def _end_call(self):
        """Ends a tool call, if the text is in one."""
        if self._inside not in (_CALLS, _CALL):
            return
        calls = self._parsed([(name, "".join(texts)) for name, texts in self._fields])
        self._skips = calls is not None and (self._skips or self._inside == _CALL)
        self._inside = None
        if calls is None:
            self._on_text("".join(self._raw))
        else:
            self._new.append(Reply(tool_calls=calls))
            self._calls += len(calls)

    def _parsed(self, fields: list[tuple[str, str]]) -> tuple[ToolCall, ...] | None:
        names = [name for name, _ in fields]
        texts = dict(fields)
        try:
            if names in ([_CALLS], [_CALL]):
                found = parse_json(fields[0][1], "The tool call")
            elif names in ([_CALLS, _ARGUMENTS], [_CALLS, _CALL_ID, _ARGUMENTS]):
                arguments = parse_json(texts[_ARGUMENTS], "The tool call")
                found = {"name": texts[_CALLS].strip(), "arguments": arguments, "id": texts.get(_CALL_ID, "").strip()}
            else:
                return None
        except InputError:
            return None
        calls = found if isinstance(found, list) else [found] if names != [_CALLS] else [None]
        if not all(map(_is_call, calls)):
            return None
        return tuple(
            ToolCall(call["name"], call["arguments"], call.get("id") or f"call{self._calls + at:05}")
            for at, call in enumerate(calls)
        )


def _is_call(call: Any) -> bool:
    return (
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and call["name"] != ""
        and isinstance(call.get("arguments"), dict)
        and isinstance(call.get("id"), str | None)
    )


class _Scanner:
    """Finds names in a text that comes in pieces: the leftmost name, and of several there the longest."""

    def __init__(self, names: Sequence[str]):
        self._pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
        self._beginnings = {name[:length] for name in names for length in range(1, len(name))}
        self._longest = max(map(len, names), default=0)
        self._held = ""

    def push(self, text: str) -> Iterator[tuple[str, bool]]:
        """Adds text, and yields what is certain: texts, and names with `True`."""
        self._held += text
        while True:
            match, begun = self._pattern.search(self._held), self._begun()
            if match is None or match.start() >= begun:
                break
            yield from self._cut(match)
        text, self._held = self._held[:begun], self._held[begun:]
        yield text, False

    def flush(self) -> Iterator[tuple[str, bool]]:
        """Ends the text, and yields the rest."""
        while (match := self._pattern.search(self._held)) is not None:
            yield from self._cut(match)
        text, self._held = self._held, ""
        yield text, False

    def _cut(self, match: re.Match[str]) -> Iterator[tuple[str, bool]]:
        yield self._held[: match.start()], False
        yield match[0], True
        self._held = self._held[match.end() :]

    def _begun(self) -> int:
        """The position from which on the text may be the begin of a name."""
        first = max(0, len(self._held) - self._longest + 1)
        return next(
            (at for at in range(first, len(self._held)) if self._held[at:] in self._beginnings), len(self._held)
        )
