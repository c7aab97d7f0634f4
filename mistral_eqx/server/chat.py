"""`/v1/chat/completions`: the answer of the assistant."""

import dataclasses
import json
import re
import secrets
from typing import Any

from ..documents import parse_json
from ..engine import Answer, Event
from ..errors import InputError
from ..text import AbstractTokenizer, Reply, ReplyParser, ToolCall
from .answering import Job
from .constraints import Constraint, constraint_of
from .conversation import encode_messages
from .log_probs import chat_log_probs, without_end
from .protocol import ChatRequest
from .service import Service


# The ids of a parser, which begin anew in each reply.
_NO_ID = re.compile(r"call\d{5}")


def chat_job(service: Service, asked: ChatRequest) -> Job:
    """Encodes the conversation; may take a while.

    **Raises:** `ApiError`.
    """
    tokenizer = service.tokenizer
    service.check_size(asked.messages, "messages")
    constraint = constraint_of(asked, tokenizer)
    ids = encode_messages(tokenizer, asked.messages, tools=constraint.tools, reasoning_effort=asked.reasoning_effort)
    options = {
        **asked.options(),
        "adapter": service.adapter(asked.model),
        "grammar": constraint.grammar,
        # The parser of replies needs the names of control tokens; JSON has none.
        "skip_special": constraint.grammar is not None and not constraint.either,
    }
    request = service.request(ids, options, ignore_eos=asked.ignore_eos, param="messages")
    return Job(
        asked,
        [dataclasses.replace(request, sample=sample) for sample in range(asked.n)],
        lambda index, answer: MessageChoice(index, answer, tokenizer, asked, constraint),
        "messages",
        "chatcmpl",
        "chat.completion",
        "chat.completion.chunk",
    )


class MessageChoice:
    """Writes a choice as the assistant's message."""

    def __init__(
        self, index: int, answer: Answer, tokenizer: AbstractTokenizer, asked: ChatRequest, constraint: Constraint
    ):
        self.enough = False
        self._index, self._answer, self._tokenizer = index, answer, tokenizer
        self._with_log_probs = asked.logprobs
        self._one_call = not asked.parallel_tool_calls
        self._reader = _reader(tokenizer, answer, constraint)
        self._parts: list[Reply] = []
        self._calls: list[dict[str, Any]] = []
        self._log_probs: list[dict[str, Any]] = []
        self._finish: str | None = None

    def begin(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def add(self, event: Event) -> list[dict[str, Any]]:
        log_probs = chat_log_probs(without_end(event, self._tokenizer), self._tokenizer)
        self._log_probs += log_probs
        part = Reply() if self.enough else self._reader.read(event)
        calls = [_written(call) for call in part.tool_calls]
        if self._one_call and calls:
            calls = calls[:1]
            self.enough = True
            self._answer.cancel()
        self._parts.append(part)
        delta: dict[str, Any] = {}
        if part.reasoning:
            delta["reasoning_content"] = part.reasoning
        if part.text:
            delta["content"] = part.text
        if calls:
            first = len(self._calls)
            delta["tool_calls"] = [{"index": first + number, **call} for number, call in enumerate(calls)]
        self._calls += calls
        chunks = [self._chunk(delta, log_probs)] if delta or log_probs else []
        if event.finish is not None:
            self._finish = "length" if event.finish == "length" else "tool_calls" if self._calls else "stop"
            chunks.append(self._chunk({}, finish=self._finish))
        return chunks

    def whole(self) -> dict[str, Any]:
        reply = Reply.join(self._parts)
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if self._calls:
            message |= {"content": reply.text or None, "tool_calls": self._calls}
        log_probs = {"content": self._log_probs, "refusal": None} if self._with_log_probs else None
        return {"index": self._index, "message": message, "logprobs": log_probs, "finish_reason": self._finish}

    def _chunk(
        self, delta: dict[str, Any], log_probs: list[dict[str, Any]] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        found = {"content": log_probs, "refusal": None} if log_probs else None
        return {"index": self._index, "delta": delta, "logprobs": found, "finish_reason": finish}


def _written(call: ToolCall) -> dict[str, Any]:
    """A tool call in OpenAI's form. Mistral's formats have ids of nine letters and digits."""
    id = secrets.token_hex(5)[:9] if _NO_ID.fullmatch(call.id) else call.id
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": id, "type": "function", "function": function}


def _reader(
    tokenizer: AbstractTokenizer, answer: Answer, constraint: Constraint
) -> "_Calls | _Either | _Text | _Parsed":
    if constraint.calls:
        return _Calls()
    if constraint.either:
        return _Either(tokenizer, answer)
    return _Text() if constraint.grammar is not None else _Parsed(tokenizer, answer, bool(constraint.tools))


class _Text:
    """Reads an answer that is JSON, in which nothing is a tag."""

    def read(self, event: Event) -> Reply:
        return Reply(event.text)


class _Calls:
    """Reads an answer that is a JSON list of calls. Without its end it stays text."""

    def __init__(self):
        self._text: list[str] = []

    def read(self, event: Event) -> Reply:
        self._text.append(event.text)
        if event.finish is None:
            return Reply()
        text = "".join(self._text)
        try:
            found = parse_json(text, "The answer")
            return Reply(tool_calls=tuple(ToolCall(call["name"], call["arguments"], "call00000") for call in found))
        except (InputError, TypeError, KeyError):
            return Reply(text)


class _Parsed:
    """Reads reasoning, text and calls. Without tools, a call that the model writes all the same is text."""

    def __init__(self, tokenizer: AbstractTokenizer, answer: Answer, with_tools: bool):
        self._parser = ReplyParser(tokenizer, after=answer.prompt)
        self._with_tools = with_tools

    def read(self, event: Event) -> Reply:
        part = self._parser.push(event.text)
        if event.finish is not None:
            part = Reply.join([part, self._parser.flush()])
        if part.tool_calls and not self._with_tools:
            calls = ({"name": call.name, "arguments": call.arguments} for call in part.tool_calls)
            written = "".join(f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>" for call in calls)
            return Reply(part.text + written, part.reasoning)
        return part


class _Either:
    """Reads an answer that is JSON, in which nothing is a tag, or calls, which begin with one."""

    def __init__(self, tokenizer: AbstractTokenizer, answer: Answer):
        self._tokenizer, self._calls = tokenizer, _Parsed(tokenizer, answer, with_tools=True)
        self._begin = ""
        self._is_json: bool | None = None

    def read(self, event: Event) -> Reply:
        if self._is_json is None:
            self._begin += event.text
            # The first two characters decide: JSON has no `<`, and no list of it begins with a letter `T`.
            if len(self._begin.lstrip()) < 2 and event.finish is None:
                return Reply()
            self._is_json = not self._begin.lstrip().startswith(("<", "[T"))
            event = dataclasses.replace(event, text=self._begin)
        if not self._is_json:
            return self._calls.read(event)
        # The name of the end token is no part of the answer.
        end = (
            self._tokenizer.token_name(event.ids[-1]) if event.ids and event.ids[-1] in self._tokenizer.eos_ids else ""
        )
        return Reply(event.text.removesuffix(end))
