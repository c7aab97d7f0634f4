"""Bodies that are right but for some entries: each is answered or refused, and none finds a fault."""

import collections
import json
import os
import random

import httpx2
import pytest
from fixtures.serving import FakeEngine, serving
from fixtures.text import templates, tiny

import mistral_eqx as mx


TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "integer"}}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "a"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "r"},
]
COMMON = {
    "stop": ["a", "b"],
    "logit_bias": {"5": 1},
    "max_tokens": 5,
    "n": 2,
    "seed": 4,
    "temperature": 0.5,
    "metadata": {"a": "b"},
    "min_tokens": 1,
    "top_k": 3,
}
TOOLS = [{"type": "function", "function": TOOL}]
# What a body must have, and what it may have, by path.
BODIES = {
    "/v1/chat/completions": (
        {"messages": MESSAGES, "tools": TOOLS},
        {
            **COMMON,
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
            "logprobs": True,
            "reasoning_effort": "low",
            "parallel_tool_calls": False,
        },
    ),
    "/v1/completions": ({"prompt": ["a", [5, 6]]}, {**COMMON, "echo": True, "logprobs": 2}),
    "/tokenize": ({"messages": MESSAGES}, {"tools": TOOLS, "add_generation_prompt": False}),
}
VALUES = [None, True, 0, 1, -1, 10**18, 10**400, 0.5, 1e308, "", "a", "auto", "required", "\ud800", "\0", "<|im_end|>"]
VALUES += ["json_object", "text", "function", "user", "assistant", "$ref", "#/x", "#", "<think>", "{}", "[", [], {}]
KEYS = [
    "role",
    "content",
    "type",
    "text",
    "function",
    "name",
    "arguments",
    "tool_calls",
    "id",
    "schema",
    "$ref",
    "$defs",
]
KEYS += ["properties", "items", "enum", "anyOf", "reasoning_content", "999", "\ud800", ""]


def changed(value, draw):
    """A value in which one entry in forty is another."""
    if draw.random() < 0.025:
        return draw.choice([*VALUES, [draw.choice(VALUES)], {draw.choice(KEYS): draw.choice(VALUES)}])
    if isinstance(value, dict):
        kept = {key: changed(entry, draw) for key, entry in value.items() if draw.random() > 0.01}
        return {**kept, draw.choice(KEYS): draw.choice(VALUES)} if draw.random() < 0.02 else kept
    return [changed(entry, draw) for entry in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_no_body_finds_a_fault(tmp_path):
    metadata = tiny.byte_level_metadata(chat_template=templates.HERMES)
    tokenizer = mx.load_tokenizer(tiny.write_gguf(tmp_path / "tiny.gguf", **metadata))
    draw, found = random.Random(0), collections.Counter()
    with serving(FakeEngine(tokenizer, context=2048, queue=10**6)) as (address, _), httpx2.Client() as client:
        for _ in range(int(os.environ.get("BODIES", "600"))):
            path = draw.choice([*BODIES])
            must, may = BODIES[path]
            chosen = {name: value for name, value in may.items() if draw.random() < 0.2}
            content = json.dumps(changed({**must, **chosen, **({"stream": True} if draw.random() < 0.3 else {})}, draw))
            answer = client.post(address + path, content=content, headers={"content-type": "application/json"})
            found[answer.status_code] += 1
            assert answer.status_code in (200, 400, 404), content
            assert answer.status_code == 200 or answer.json()["error"]["type"] == "invalid_request_error", content
            assert '"error"' not in answer.text or answer.status_code != 200, content
    assert min(found[200], found[400]) > found.total() / 5
