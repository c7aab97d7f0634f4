"""Conversations as text and as token ids."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, overload

from ..documents import DEEPEST, depth, shown
from ..errors import InputError
from .instruct import encode_instruct
from .templates import render
from .tokenizer import AbstractTokenizer


Messages: TypeAlias = Sequence[Mapping[str, Any]]

# A text, or the ids that there are without one.
Written = TypeVar("Written", str, list[int])

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

    - `assistant_mask`: whether to return, too, which ids are the assistant's words: those that have a part between
        `{% generation %}` and `{% endgeneration %}` if the template has them, else what each answer adds to the
        conversation before it that waits for an answer. There the ids are those of the prompt and of the answer, each
        encoded alone: as when the model answers.

    **Returns:** the ids. The beginning of the text is there if the template writes it. With `assistant_mask` the ids
    and a list of as many booleans.

    **Raises:** `InputError` as `render_chat` does, but not for Mistral's release files; with `assistant_mask` if the
    assistant says nothing, or the template writes a turn in another way once another one follows.
    """
    messages = _plain(messages)
    if tokenizer.chat_template is None:
        return _encode_release(tokenizer, messages, assistant_mask)
    written = _write(tokenizer, messages, add_generation_prompt)
    if not assistant_mask:
        return tokenizer.encode_segments(written.segments)
    if _has_generation(tokenizer):
        ids, mask = _overlapping(tokenizer, written)
    else:
        turns = _turns(messages, written.text, lambda part, prompt: _write(tokenizer, part, prompt).text)
        ids, mask = _apart(tokenizer, written, turns)
    if not any(mask):
        raise InputError("The assistant says nothing here, so there is nothing to learn; give an answer.")
    return ids, mask


_REMEDY = "give a folder or .gguf of an instruction-tuned model, or put a chat_template.jinja beside its tokenizer"


def _encode_release(
    tokenizer: AbstractTokenizer, messages: list[dict[str, Any]], assistant_mask: bool
) -> list[int] | tuple[list[int], list[bool]]:
    file = tokenizer.release_file
    if file is None:
        raise InputError(f"{tokenizer.name} has no chat template; {_REMEDY}.")
    ids = encode_instruct(file, messages)
    if not assistant_mask:
        return ids
    turns = _turns(messages, ids, lambda part, prompt: encode_instruct(file, part))
    return ids, [any(start <= at < stop for start, stop in turns) for at in range(len(ids))]


def _turns(
    messages: list[dict[str, Any]], whole: Written, write: Callable[[list[dict[str, Any]], bool], Written]
) -> list[tuple[int, int]]:
    """Where each of the assistant's messages stands in what is written of all: what it adds to the prompt before it."""
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant" and number > 0]
    if not numbers:
        raise InputError("No message but the first is the assistant's, so there is nothing to learn; give an answer.")
    turns: list[tuple[int, int]] = []
    for number in numbers:
        before, after = write(messages[:number], True), write(messages[: number + 1], False)
        if after[: len(before)] != before or whole[: len(after)] != after:
            raise InputError(
                f"The chat template writes what comes before message {number} otherwise when it is answered or "
                "more follows, so the assistant's words cannot be told apart; learn each answer as a conversation "
                "of its own, or give a template that only adds to what it wrote.",
                key="messages",
            )
        turns.append((len(before), len(after)))
    return turns


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a text: plain text, or the id of a control token that the template itself wrote."""

    start: int
    stop: int
    content: str | int


@dataclasses.dataclass(frozen=True)
class _Chat:
    """What a template wrote.

    **Attributes:**

    - `text`: all of it.
    - `parts`: of it, in order.
    - `generated`: where its blocks of generation start and stop.
    """

    text: str
    parts: list[_Part]
    generated: list[tuple[int, int]]

    @property
    def segments(self) -> Iterator[str | int]:
        """As `AbstractTokenizer.encode_segments` takes them."""
        return (part.content for part in self.parts)


def _apart(
    tokenizer: AbstractTokenizer, written: _Chat, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """The ids, and which of them are of the spans, each of which is encoded alone."""
    ids: list[int] = []
    mask: list[bool] = []
    cuts = sorted({cut for span in spans for cut in span})
    for part in written.parts:
        bounds = [part.start, *(cut for cut in cuts if part.start < cut < part.stop), part.stop]
        whole = isinstance(part.content, int)
        for start, stop in [(part.start, part.stop)] if whole else itertools.pairwise(bounds):
            content = part.content if isinstance(part.content, int) else written.text[start:stop]
            ids += _encode(tokenizer, content, first=not ids)
            mask += [any(first <= start < last for first, last in spans)] * (len(ids) - len(mask))
    return ids, mask


def _overlapping(tokenizer: AbstractTokenizer, written: _Chat) -> tuple[list[int], list[bool]]:
    """The ids, and which of them have a part in the template's blocks of generation."""
    ids: list[int] = []
    mask: list[bool] = []
    for part in written.parts:
        made = _encode(tokenizer, part.content, first=not ids)
        stops = [part.stop] * len(made)
        if isinstance(part.content, str):
            sizes = [len(tokenizer.token_bytes(id, first=not ids and at == 0)) for at, id in enumerate(made)]
            stops = _characters(part, list(itertools.accumulate(sizes)))
            if stops is None:
                # The tokenizer changes texts, so its tokens have no place in this one.
                return _apart(tokenizer, written, written.generated)
        starts = [part.start, *stops[:-1]]
        ids += made
        mask += [
            any(start < last and stop > first for first, last in written.generated)
            for start, stop in zip(starts, stops, strict=True)
        ]
    return ids, mask


def _characters(part: _Part, ends: list[int]) -> list[int] | None:
    """Behind which character of the text each token of a part ends, if its bytes are those of the text."""
    content = str(part.content)
    places = list(itertools.accumulate((len(character.encode()) for character in content), initial=0))
    if not ends or ends[-1] != places[-1]:
        return None
    stops: list[int] = []
    at = 0
    for end in ends:
        while places[at] < end:
            at += 1
        stops.append(part.start + at)
    return stops


def _encode(tokenizer: AbstractTokenizer, content: str | int, first: bool) -> list[int]:
    """The ids of a segment, which stands behind others unless it is the first."""
    return tokenizer.encode_segments([content]) if first else tokenizer.encode_segments([0, content])[1:]


def _has_generation(tokenizer: AbstractTokenizer) -> bool:
    return "endgeneration" in (tokenizer.chat_template or "")


@dataclasses.dataclass(frozen=True)
class _Name:
    """The name of a control token in a text, with the white space that it swallows, and whether a message has it."""

    name: str
    start: int
    stop: int
    of_message: bool


def _write(tokenizer: AbstractTokenizer, messages: list[dict[str, Any]], add_generation_prompt: bool) -> _Chat:
    """What the template writes, and which control tokens in it are its own.

    For this it writes once more, with marks around the names of control tokens that messages have. It may strip or
    search where a mark stands in the way, so it is only taken from there whose the names are: the text is that of the
    messages as they are, unless that does not tell.
    """
    begin, end, left, right = _unused_characters(messages, tokenizer.chat_template or "", 4)
    generation = {"generation_start": begin, "generation_end": end} if _has_generation(tokenizer) else {}
    text, marks = _taken_out(_render(tokenizer, messages, add_generation_prompt, generation), begin + end)
    names = list(_names(tokenizer, text, 0, len(text)))
    marked = _marked(messages, _marker(tuple(tokenizer.control_tokens)), left, right)
    if marked != messages:
        raw = _render(tokenizer, marked, add_generation_prompt, generation)
        other_text, other_marks = _taken_out(raw, begin + end + left + right)
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
            f"The chat template of {tokenizer.name} cuts its blocks of generation, so the assistant's words cannot be "
            "told apart; use another template.",
            key="chat_template",
        )
    return _Chat(text, list(_parts(tokenizer, text, names)), list(zip(opened, closed, strict=True)))


def _names(tokenizer: AbstractTokenizer, text: str, start: int, stop: int) -> Iterator[_Name]:
    for match in tokenizer.control_pattern.finditer(text, start, stop):
        yield _Name(match[match.lastindex or 0], match.start(), match.end(), False)


def _names_between(
    tokenizer: AbstractTokenizer, text: str, marks: list[tuple[int, str]], left: str, right: str
) -> list[_Name]:
    """The names in a text, none of which goes across a mark; those between two marks are of messages."""
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
    """The names, each with whose it is as found among marks: by the order or, if that differs, by the name alone."""
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


def _parts(tokenizer: AbstractTokenizer, text: str, names: list[_Name]) -> Iterator[_Part]:
    end = 0
    for name in names:
        if not name.of_message:
            if end < name.start:
                yield _Part(end, name.start, text[end : name.start])
            yield _Part(name.start, name.stop, tokenizer.control_tokens[name.name])
            end = name.stop
    if end < len(text):
        yield _Part(end, len(text), text[end:])


def _taken_out(text: str, marks: str) -> tuple[str, list[tuple[int, str]]]:
    """The text without marks, and where each stood. A template may have written them as JSON does."""
    for mark in marks:
        text = text.replace(_escaped(mark), mark)
    pieces = re.split(f"([{marks}])", text)
    lengths = itertools.accumulate(map(len, pieces[::2]))
    return "".join(pieces[::2]), list(zip(lengths, pieces[1::2], strict=False))


@functools.lru_cache(maxsize=8)
def _marker(names: tuple[str, ...]) -> Callable[[str, str, str], str]:
    """What puts marks around names in a text, and one behind the beginning of a name at its end."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    beginnings = {name[:length] for name in names for length in range(1, len(name))}
    beginnings = {beginning for beginning in beginnings if not beginning.isspace()}
    longest = max(map(len, names), default=0)

    def mark(text: str, left: str, right: str) -> str:
        marked = pattern.sub(lambda name: f"{left}{name[0]}{right}", text)
        # What follows must not complete it.
        begun = any(text[-length:] in beginnings for length in range(1, min(longest, len(text) + 1)))
        return marked + right if begun else marked

    return mark


def _marked(value: Any, mark: Callable[[str, str, str], str], left: str, right: str) -> Any:
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
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        plain = json.loads(json.dumps(given))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"The messages must consist of text, numbers, lists and dicts: {error}.") from error
    if depth(plain) > DEEPEST:
        raise InputError(f"The messages nest deeper than {DEEPEST} levels, which no conversation does; give others.")
    return [_with_reasoning(message) for message in plain]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _unused_characters(messages: list[dict[str, Any]], template: str, count: int) -> list[str]:
    """Characters for private use that nobody uses here."""
    used = json.dumps(messages, ensure_ascii=False) + template
    codes = itertools.chain(range(0xE000, 0xF8FF), range(0xF0000, 0xFFFFE))
    free = (mark for mark in map(chr, codes) if mark not in used and _escaped(mark) not in used)
    found = list(itertools.islice(free, count))
    if len(found) < count:
        raise InputError("The messages have every character for private use, which is no text; give others.")
    return found


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
