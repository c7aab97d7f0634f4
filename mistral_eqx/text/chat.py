"""Conversations as text and as token ids."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, overload

from ..documents import shown
from ..errors import InputError
from .instruct import encode_instruct
from .templates import render
from .tokenizer import AbstractTokenizer


Messages: TypeAlias = Sequence[Mapping[str, Any]]

# A character of plain text, or the id of a control token.
_Unit: TypeAlias = str | int

# Where messages may have what the model thought before it answered, the usual name first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def render_chat(tokenizer: AbstractTokenizer, messages: Messages, *, add_generation_prompt: bool = True) -> str:
    """A conversation as the text that the model was trained on.

    The template runs in a sandbox, within limits of time and memory: it comes with a checkpoint, and may be anyone's.
    It has the variables that transformers gives it: `messages`, `add_generation_prompt`, `bos_token` and the other
    tokens that the tokenizer's files name.

    **Arguments:**

    - `tokenizer`: its chat template is used.
    - `messages`: in order, each a dict with `"role"` (`"system"`, `"user"` or `"assistant"`) and `"content"`. A key
        whose value is `None` counts as absent.
    - `add_generation_prompt`: whether the text ends where the assistant's answer starts.

    **Returns:** text with the names of control tokens in it.

    **Raises:** `InputError` if there is no template, the template is wrong or forbidden, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        remedy = "encode_chat gives the ids directly" if tokenizer.release_file else _REMEDY
        raise InputError(f"{tokenizer.name} has no chat template; {remedy}.")
    return _render(tokenizer, _plain(messages), add_generation_prompt)


@overload
def encode_chat(
    tokenizer: AbstractTokenizer,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    assistant_mask: Literal[False] = False,
) -> list[int]: ...


@overload
def encode_chat(
    tokenizer: AbstractTokenizer,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    assistant_mask: Literal[True],
) -> tuple[list[int], list[bool]]: ...


def encode_chat(
    tokenizer: AbstractTokenizer,
    messages: Messages,
    *,
    add_generation_prompt: bool = True,
    assistant_mask: bool = False,
) -> list[int] | tuple[list[int], list[bool]]:
    """A conversation as token ids.

    Only the template can write control tokens: a message that has the name of one, such as `<|im_end|>`, is encoded
    as those letters. Mistral's release files have no template, and mistral-common knows their format.

    **Arguments:** as of [`mistral_eqx.text.render_chat`][], and

    - `assistant_mask`: whether to return, too, which ids are the assistant's words: those between `{% generation %}`
        and `{% endgeneration %}` if the template has them, else what each answer adds to the conversation before it
        that waits for an answer. There the ids are those of the prompt and of the answer, each encoded alone: as when
        the model answers.

    **Returns:** the ids. The beginning of the text is there if the template writes it. With `assistant_mask` the ids
    and a list of as many booleans.

    **Raises:** `InputError` as `render_chat` does, but not for Mistral's release files; with `assistant_mask` if the
    assistant says nothing, or the template writes a turn in another way once another one follows.
    """
    messages = _plain(messages)
    if tokenizer.chat_template is None and tokenizer.release_file is None:
        raise InputError(f"{tokenizer.name} has no chat template; {_REMEDY}.")
    units = _Units(tokenizer)
    if not assistant_mask:
        return units.encode(units.of(messages, add_generation_prompt))[0]
    learned, marked = units.learned(messages)
    return units.encode(learned, marked)


_REMEDY = "give a folder or .gguf of an instruction-tuned model, or put a chat_template.jinja beside its tokenizer"


class _Units:
    """Conversations as characters and control tokens, before the characters become tokens."""

    def __init__(self, tokenizer: AbstractTokenizer):
        self._tokenizer = tokenizer
        names = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._names = "|".join(map(re.escape, names)) or "(?!)"

    def of(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> list[_Unit]:
        """A conversation; what the messages have is characters alone."""
        return [unit for unit, _ in self._generated(messages, add_generation_prompt)]

    def learned(self, messages: list[dict[str, Any]]) -> tuple[list[_Unit], list[bool]]:
        """A whole conversation, and which of its units are the assistant's."""
        if "endgeneration" in (self._tokenizer.chat_template or ""):
            pairs = list(self._generated(messages, False))
            if not any(is_learned for _, is_learned in pairs):
                raise InputError("The assistant says nothing here, so there is nothing to learn; give an answer.")
            return [unit for unit, _ in pairs], [is_learned for _, is_learned in pairs]
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant" and number > 0]
        if not turns:
            raise InputError(
                "No message but the first is the assistant's, so there is nothing to learn; give an answer."
            )
        whole = self.of(messages, False)
        marked = [False] * len(whole)
        for number in turns:
            before, after = self.of(messages[:number], True), self.of(messages[: number + 1], False)
            if after[: len(before)] != before or whole[: len(after)] != after:
                raise InputError(
                    f"The chat template writes what comes before message {number} otherwise when it is answered or "
                    "more follows, so the assistant's words cannot be told apart; learn each answer as a conversation "
                    "of its own, or give a template that only adds to what it wrote."
                )
            marked[len(before) : len(after)] = [True] * (len(after) - len(before))
        return whole, marked

    def encode(self, units: Sequence[_Unit], marked: Sequence[bool] | None = None) -> tuple[list[int], list[bool]]:
        """The ids of units, and which of them are of marked ones; no token has units of both kinds."""
        ids: list[int] = []
        mask: list[bool] = []
        start = 0
        for stop in range(1, len(units) + 1):
            text = isinstance(units[start], str)
            goes_on = stop < len(units) and text and isinstance(units[stop], str)
            if goes_on and (marked is None or marked[stop] == marked[start]):
                continue
            segment = units[start:stop]
            if text:
                segment = self._tokenizer.encode_text("".join(map(str, segment)), first=not ids)
            ids += [int(id) for id in segment]
            mask += [marked is not None and marked[start]] * (len(ids) - len(mask))
            start = stop
        return ids, mask

    def _generated(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> Iterator[tuple[_Unit, bool]]:
        """Each unit with whether it stands between the template's marks of generation."""
        tokenizer = self._tokenizer
        if tokenizer.chat_template is None:
            assert tokenizer.release_file is not None
            yield from ((id, False) for id in encode_instruct(tokenizer.release_file, messages))
            return
        start, end, left, right = _unused_characters(messages, tokenizer.chat_template, 4)
        variables = {"generation_start": start, "generation_end": end}
        text = self._with_marks(messages, add_generation_prompt, variables, left, right)
        for part in re.split(f"({start}[^{end}]*{end}?)", text):
            generated = part.startswith(start)
            part = part.replace(start, "").replace(end, "")
            yield from ((unit, generated) for unit in self._parsed(part, left, right))

    def _with_marks(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, str],
        left: str,
        right: str,
    ) -> str:
        """The text in which the names that messages have stand between marks.

        A template may search for a name, split and strip: of several ways to put marks the first is taken with which it
        writes what it writes without marks.
        """
        plain = _render(self._tokenizer, messages, add_generation_prompt, variables)
        if _marked(messages, self._mark_closely, left, right) == messages:
            return plain
        texts: list[str] = []
        for mark in (self._mark_closely, self._mark_with_spaces, self._mark_inside):
            shielded = _marked(messages, mark, left, right)
            text = _render(self._tokenizer, shielded, add_generation_prompt, variables)
            # A template may have written the marks as JSON does.
            for character in (left, right):
                text = text.replace(_escaped(character), character)
            if text.replace(left, "").replace(right, "") == plain:
                return text
            texts.append(text)
        return texts[0]

    def _mark_closely(self, text: str, left: str, right: str) -> str:
        return self._guarded(re.sub(self._names, lambda name: f"{left}{name[0]}{right}", text), text, right)

    def _mark_with_spaces(self, text: str, left: str, right: str) -> str:
        """White space between a name and other text goes between the marks, so that it can be stripped."""
        pattern = rf"(?<=\S)(\s*)({self._names})(\s*)(?=\S)|(?:(?<=\S)\s+)?(?:{self._names})(?:\s+(?=\S))?"
        return self._guarded(re.sub(pattern, lambda name: f"{left}{name[0]}{right}", text), text, right)

    def _mark_inside(self, text: str, left: str, right: str) -> str:
        """Marks stand inside the text only, so that it begins and ends as it did."""
        marked = re.sub(self._names, lambda name: f"{left}{name[0]}{right}", text)
        return self._guarded(marked.removeprefix(left).removesuffix(right), text, "")

    def _guarded(self, marked: str, text: str, mark: str) -> str:
        """With a mark after the beginning of a name at the end, which nothing that follows may complete."""
        names = self._tokenizer.control_tokens
        begun = any(text.endswith(name[:length]) for name in names for length in range(1, len(name)))
        return marked + mark if begun else marked

    def _parsed(self, text: str, left: str, right: str) -> Iterator[_Unit]:
        name = f"(?:{self._names})"
        of_messages = rf"{left}(\s*{name}\s*){right}|{left}({name})|({name}){right}"
        end = 0
        for match in [*re.finditer(of_messages, text), None]:
            stop = len(text) if match is None else match.start()
            # A mark whose name was split off still keeps apart what stands around it.
            for part in re.split(f"[{left}{right}]", text[end:stop]):
                for segment in self._tokenizer.segments(part):
                    yield from [segment] if isinstance(segment, int) else segment
            if match is not None:
                yield from match[match.lastindex or 0]
                end = match.end()


def _marked(value: Any, mark: Any, left: str, right: str) -> Any:
    """Marks each text in a document, keys included."""
    if isinstance(value, list):
        return [_marked(inner, mark, left, right) for inner in value]
    if isinstance(value, dict):
        return {mark(key, left, right): _marked(inner, mark, left, right) for key, inner in value.items()}
    return mark(value, left, right) if isinstance(value, str) else value


def _plain(messages: Messages) -> list[dict[str, Any]]:
    """The messages as nothing but JSON's types, so that a template can call no method of a user's object.

    As in transformers, keys whose value is null count as absent, and a thought stands under each of its usual names.
    """
    if not messages:
        raise InputError("The conversation is empty; give at least one message.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"Each message must be a dict with 'role' and 'content', not {shown(message)}.")
    try:
        plain = json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"The messages must consist of text, numbers, lists and dicts: {error}.") from error
    return [_with_reasoning({key: value for key, value in each.items() if value is not None}) for each in plain]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _unused_characters(messages: list[dict[str, Any]], template: str, count: int) -> list[str]:
    """Characters for private use that nobody uses here."""
    used = json.dumps(messages, ensure_ascii=False) + template
    marks = (chr(code) for code in range(0xE000, 0xF8FF))
    free = (mark for mark in marks if mark not in used and _escaped(mark) not in used)
    return [next(free) for _ in range(count)]


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


def _render(
    tokenizer: AbstractTokenizer,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    variables: Mapping[str, str] | None = None,
) -> str:
    return render(
        tokenizer.chat_template or "",
        {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **tokenizer.template_tokens,
            **(variables or {}),
        },
        f"The chat template of {tokenizer.name}",
    )
