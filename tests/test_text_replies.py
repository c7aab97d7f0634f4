"""Replies: text, reasoning and tool calls."""

import itertools
import json

import pytest
from fixtures.text import templates, tiny
from hypothesis import given, settings, strategies as st

import mistral_eqx as mx
from mistral_eqx.text import encode_chat, load_tokenizer


CONTROLS = ["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Mistral's names are control tokens, tags are text."""
    tokens = tiny.byte_level_tokens(*CONTROLS)
    types = [tiny.CONTROL] * 3 + [tiny.NORMAL] * (len(tokens) - 8) + [tiny.CONTROL] * 5
    metadata = tiny.byte_level_metadata(tokens=tokens, token_type=types, chat_template=templates.HERMES)
    return load_tokenizer(tiny.write_gguf(tmp_path_factory.mktemp("replies") / "tiny.gguf", **metadata))


def call(name, arguments, id="call00000"):
    return mx.ToolCall(name, arguments, id)


ADD = call("add", {"a": 1, "b": [2, None]})
JSON = '{"name": "add", "arguments": {"a": 1, "b": [2, null]}}'
REPLIES = {
    "": mx.Reply(),
    "Hello\n\n": mx.Reply("Hello\n\n"),
    "a<|im_end|>": mx.Reply("a"),
    # Reasoning.
    "[THINK]hm\n[/THINK]\nyes": mx.Reply("\nyes", "hm\n"),
    "<think>\nhm\n\nso\n</think>\n\nyes\n": mx.Reply("yes\n", "hm\n\nso"),
    "<think>hm": mx.Reply("", "hm"),
    "<think>\n\n</think>\n\nyes": mx.Reply("yes"),
    "a</think>b": mx.Reply("a</think>b"),
    "<think>a <tool_call>b</tool_call>": mx.Reply("", "a <tool_call>b</tool_call>"),
    # The forms of calls.
    f"[TOOL_CALLS] [{JSON}]<|im_end|>": mx.Reply(tool_calls=(ADD,)),
    '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abc"}, {"name": "g", "arguments": {}}]': mx.Reply(
        tool_calls=(call("f", {}, "abc"), call("g", {}, "call00001"))
    ),
    'yes[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"é": "[/THINK"}[TOOL_CALLS]g[CALL_ID]d[ARGS]{}': mx.Reply(
        "yes", tool_calls=(call("f", {"é": "[/THINK"}, "abc"), call("g", {}, "d"))
    ),
    '[THINK]hm[/THINK][TOOL_CALLS]f[ARGS]{"a": "<think>"}[TOOL_CALLS]g[ARGS]{}': mx.Reply(
        "", "hm", (call("f", {"a": "<think>"}), call("g", {}, "call00001"))
    ),
    f"Sure.\n<tool_call>\n{JSON}\n</tool_call>\n<tool_call>{JSON}</tool_call>\n": mx.Reply(
        "Sure.", tool_calls=(ADD, call("add", ADD.arguments, "call00001"))
    ),
    f"a\n<tool_call>[{JSON}]</tool_call>\nb": mx.Reply("a\nb", tool_calls=(ADD,)),
    "<tool_call>[]</tool_call>": mx.Reply(),
    f"<tool_call>{JSON}": mx.Reply(tool_calls=(ADD,)),
}
WRONG = [
    "[TOOL_CALLS] [{bad]",
    "[TOOL_CALLS]" + JSON,
    '[TOOL_CALLS] [{"name": "f"}]',
    '[TOOL_CALLS] [{"name": "f", "arguments": "{}"}]',
    '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": 5}]',
    "[TOOL_CALLS]f[ARGS]{",
    "[TOOL_CALLS]f[ARGS][1]",
    "[TOOL_CALLS][ARGS]{}",
    "[TOOL_CALLS]f[CALL_ID]a",
    "[TOOL_CALLS]f[ARGS]{}[ARGS]{}",
    '[TOOL_CALLS]f[ARGS]{"a": NaN}',
    "[TOOL_CALLS]f[ARGS]" + '{"a":' * 100 + "1" + "}" * 100,
    "a\n<tool_call>\n{bad}\n</tool_call>\nb",
    "<tool_call>5</tool_call>",
    "<tool_call>" + "[" * 2_000,
    '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    "<tool_call>",
]


def to_ids(tokenizer, text):
    return tokenizer.encode(text, add_bos=False, parse_special=True)


@pytest.mark.parametrize("text", REPLIES)
def test_the_forms_of_replies(tokenizer, text):
    assert mx.parse_reply(tokenizer, text) == REPLIES[text]
    assert mx.parse_reply(tokenizer, to_ids(tokenizer, text)) == REPLIES[text]


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_call_stays_text(tokenizer, text):
    assert mx.parse_reply(tokenizer, text) == mx.Reply(text)
    assert mx.parse_reply(tokenizer, to_ids(tokenizer, text)) == mx.Reply(text)


def test_names_that_are_spelled_out_are_text(tokenizer):
    text = f"[THINK]a[/THINK][TOOL_CALLS][{JSON}]"
    ids = tokenizer.encode(text, add_bos=False)
    assert mx.parse_reply(tokenizer, ids) == mx.Reply(text)
    # In a given text they cannot be told apart.
    assert mx.parse_reply(tokenizer, tokenizer.decode(ids)) == mx.Reply("", "a", (ADD,))


def test_tags_that_are_control_tokens_count_as_such(tmp_path):
    tokens = tiny.byte_level_tokens("<think>", "</think>")
    types = [tiny.CONTROL] * 3 + [tiny.NORMAL] * (len(tokens) - 5) + [tiny.CONTROL] * 2
    metadata = tiny.byte_level_metadata(tokens=tokens, token_type=types)
    tokenizer = load_tokenizer(tiny.write_gguf(tmp_path / "tiny.gguf", **metadata))
    ids = to_ids(tokenizer, "<think>\nhm\n</think>\n\nyes")
    assert mx.parse_reply(tokenizer, ids) == mx.Reply("yes", "hm")
    spelled = tokenizer.encode("<think>hm</think>yes", add_bos=False)
    assert mx.parse_reply(tokenizer, spelled) == mx.Reply("<think>hm</think>yes")


def test_a_prompt_may_begin_the_reasoning(tokenizer):
    for prompt, text in (("a<think>\n", "\nhm\n</think>\nyes"), ("a[THINK]", "hm[/THINK]yes")):
        after = to_ids(tokenizer, prompt)
        assert mx.parse_reply(tokenizer, text, after=after) == mx.Reply("yes", "hm")
        assert mx.parse_reply(tokenizer, to_ids(tokenizer, text), after=after) == mx.Reply("yes", "hm")
    assert mx.parse_reply(tokenizer, "hm", after=to_ids(tokenizer, "<think>a")) == mx.Reply("hm")


PIECES = [
    "\n",
    "\n\n",
    "a",
    "é",
    "<",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<|im_end|>",
    JSON,
    "[",
    "]",
]
PIECES += [*CONTROLS, "f", "{}", '{"a": "</think>"}', "[TOOL_", "CALLS]", "<th", "ink>", "<|im_", "end|>"]


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.sampled_from([*REPLIES, *WRONG[:13]]),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    begun=st.booleans(),
)
def test_pieces_add_up_to_the_whole_wherever_they_end(tokenizer, text, cuts, begun):
    after = to_ids(tokenizer, "<think>") if begun else []
    whole = mx.parse_reply(tokenizer, text, after=after)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for pieces in (
        [text[start:stop] for start, stop in itertools.pairwise(bounds)],
        list(text),
        to_ids(tokenizer, text),
    ):
        parser = mx.ReplyParser(tokenizer, after=after)
        parts = [parser.push(piece) for piece in pieces]
        assert mx.Reply.join([*parts, parser.flush()]) == whole
    # No text is lost: what is not a name of a control token or a tag is somewhere in the reply.
    assert whole.text.count("é") + whole.reasoning.count("é") == text.count("é") or whole.tool_calls


def test_text_is_not_held_back_for_longer_than_necessary(tokenizer):
    parser = mx.ReplyParser(tokenizer)
    pushed = [("a ", "a "), ("b <", "b "), ("c", "<c"), ("\n", ""), ("d", "\nd"), (" <thin", " "), ("k", "")]
    assert [parser.push(piece).text for piece, _ in pushed] == [text for _, text in pushed]
    assert parser.flush() == mx.Reply("<think")


def test_a_reply_is_the_next_message(tokenizer):
    text = f"<think>\nhm\n</think>\n\nSure.\n<tool_call>\n{JSON}\n</tool_call>"
    reply = mx.parse_reply(tokenizer, text)
    message = reply.message()
    function = {"name": "add", "arguments": {"a": 1, "b": [2, None]}}
    calls = [{"id": "call00000", "type": "function", "function": function}]
    assert message == {"role": "assistant", "content": "Sure.", "reasoning_content": "hm", "tool_calls": calls}
    ids = encode_chat(tokenizer, [templates.USER, message], add_generation_prompt=False)
    assert tokenizer.decode(ids, skip_special=False).endswith(f"assistant\n{text}<|im_end|>\n")
    assert mx.Reply("Hi").message() == {"role": "assistant", "content": "Hi"}


@pytest.mark.parity
@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
def test_calls_that_mistral_common_writes_are_those_that_it_reads(tmp_path, version):
    tools = pytest.importorskip("mistral_common.experimental.tools")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    file = tiny.write_tekken(tmp_path, version)
    tokenizer = load_tokenizer(file)
    thought = "" if version != "v13" else "hm\n"
    message = {**templates.TWO_CALLS, **({"reasoning_content": thought} if thought else {})}
    prompt = encode_chat(tokenizer, [templates.USER])
    ids = encode_chat(tokenizer, [templates.USER, message])[len(prompt) : -1]
    begin = tokenizer.control_tokens["[TOOL_CALLS]"]
    _, calls = tools._split_content_and_tool_calls(ids, begin)
    theirs = tools._decode_tool_calls(calls, Tekkenizer.from_file(file))
    reply = mx.parse_reply(tokenizer, ids, after=prompt)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [
        (each.function.name, json.loads(each.function.arguments)) for each in theirs
    ]
    ids_written = [each.id for each in theirs] if version != "v13" else ["call00000", "call00001"]
    assert [call.id for call in reply.tool_calls] == ids_written
    assert (reply.text, reply.reasoning) == ("", thought)
    # The reply as a message has the same ids.
    assert encode_chat(tokenizer, [templates.USER, reply.message()]) == [*prompt, *ids, 2]
