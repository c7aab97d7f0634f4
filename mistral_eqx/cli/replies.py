"""Replies in a conversation: how they are shown, and kept for the next turn."""

import json
import sys
from typing import Any

from ..text import AbstractTokenizer, Reply, ToolCall


_DIM, _PLAIN = "\033[2m", "\033[22m"


class ShownReply:
    """Writes a reply to stdout as it comes: reasoning dimmed if stdout is a terminal, and each tool call on a line."""

    def __init__(self):
        self._on_terminal = sys.stdout.isatty()
        self._kind = "text"
        self._last = "\n"

    def add(self, part: Reply):
        """Writes what is new."""
        self._write(part.reasoning, "reasoning")
        self._write(part.text, "text")
        for call in part.tool_calls:
            self._write(as_text(call), "call")
        sys.stdout.flush()

    def end(self):
        """Ends the reply with a line break."""
        self._write("\n", "text")
        sys.stdout.flush()

    def _write(self, text: str, kind: str):
        if not text:
            return
        if kind != self._kind and self._on_terminal and "reasoning" in (kind, self._kind):
            sys.stdout.write(_DIM if kind == "reasoning" else _PLAIN)
        # Reasoning, answer and each call begin on a line of their own.
        if (kind != self._kind or kind == "call") and "\n" not in (self._last, text):
            sys.stdout.write("\n")
        sys.stdout.write(text)
        self._kind, self._last = kind, text[-1]


def as_text(call: ToolCall) -> str:
    """A tool call for a reader, such as `add(a=1, b="two")`."""
    arguments = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items())
    return f"{call.name}({', '.join(arguments)})"


def as_message(tokenizer: AbstractTokenizer, reply: Reply) -> dict[str, Any]:
    """The reply as the assistant's message. Calls are part of the text, because nothing answers them."""
    lines = [reply.text] if reply.text else []
    message = {"role": "assistant", "content": "\n".join([*lines, *map(as_text, reply.tool_calls)])}
    # Before version 13, Mistral's formats have no reasoning.
    keeps = tokenizer.chat_template is not None or "[THINK]" in tokenizer.control_tokens
    return {**message, "reasoning_content": reply.reasoning} if reply.reasoning and keeps else message
