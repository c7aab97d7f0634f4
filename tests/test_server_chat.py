"""Chat completions, by the official client."""

import asyncio
import json
import re

import openai
import pytest
from fixtures.serving import FakeEngine, serving, tiny_tokenizer
from fixtures.text import templates, tiny

import mistral_eqx as mx
from mistral_eqx.server.constraints import constraint_of
from mistral_eqx.server.protocol import ChatRequest


ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "$ref": "#/$defs/place",
            "$defs": {"place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return FakeEngine(tiny_tokenizer(tmp_path_factory.mktemp("model") / "model"), cached=3)


@pytest.fixture(scope="module")
def tools_engine(tmp_path_factory):
    """With a template that has tools and reasoning."""
    file = tmp_path_factory.mktemp("hermes") / "tiny.gguf"
    metadata = tiny.byte_level_metadata(chat_template=templates.HERMES)
    return FakeEngine(mx.load_tokenizer(tiny.write_gguf(file, **metadata)), context=2048)


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine) as (address, _):
        yield address


@pytest.fixture(scope="module")
def tools_server(tools_engine):
    with serving(tools_engine) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tools_client(tools_server):
    with openai.OpenAI(base_url=f"{tools_server}/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client, **options):
    return client.chat.completions.create(**{**ASKED, **options})


@pytest.fixture(autouse=True)
def same_reply(engine):
    engine.reply, engine.pause, engine.fails = "Hello, world!", 0.0, None
    yield
    engine.wait()


def test_an_answer(client, engine):
    found = create(client)
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, world!")
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is None
    assert choice.logprobs is None
    assert (found.object, found.model) == ("chat.completion", "tiny")
    assert found.id.startswith("chatcmpl-")
    prompt = mx.encode_chat(engine.tokenizer, ASKED["messages"])
    assert tuple(engine.requests[-1].prompt) == tuple(prompt)
    assert found.usage.prompt_tokens == len(prompt)
    # The end token counts.
    assert found.usage.completion_tokens == len("Hello, world!") + 1
    assert found.usage.total_tokens == len(prompt) + 14
    assert found.usage.prompt_tokens_details.cached_tokens == 3


def test_a_stream(client):
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    *parts, usage = chunks
    assert len({chunk.id for chunk in chunks}) == 1
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in parts) == "Hello, world!"
    assert [chunk.choices[0].finish_reason for chunk in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in parts)
    assert (usage.choices, usage.usage.completion_tokens) == ([], 14)
    assert all(chunk.usage is None for chunk in create(client, stream=True))


def test_an_asynchronous_client(server):
    async def both():
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(**ASKED)
            parts = [part async for part in await client.chat.completions.create(**ASKED, stream=True)]
            several = await asyncio.gather(*(client.chat.completions.create(**ASKED) for _ in range(8)))
        return whole, parts, several

    whole, parts, several = asyncio.run(both())
    assert whole.choices[0].message.content == "Hello, world!"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "Hello, world!"
    assert {one.choices[0].message.content for one in several} == {"Hello, world!"}


def test_several_choices(client, engine):
    engine.reply = lambda request: f"answer {request.sample}"
    found = create(client, n=3, seed=7)
    assert [choice.message.content for choice in found.choices] == ["answer 0", "answer 1", "answer 2"]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    # The prompt counts once.
    assert found.usage.prompt_tokens == len(engine.answers[-1].prompt)
    assert found.usage.completion_tokens == 3 * 9
    assert [request.seed for request in engine.requests[-3:]] == [7, 7, 7]
    texts = ["", "", ""]
    for chunk in create(client, n=3, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == ["answer 0", "answer 1", "answer 2"]


# Each parameter, and what the engine is asked for.
WORKS = [
    ({}, {"temperature": 1.0, "top_p": None, "top_k": None, "seed": None, "logprobs": None, "max_new_tokens": None}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
    ({"max_tokens": 5}, {"max_new_tokens": 5}),
    ({"max_completion_tokens": 5, "max_tokens": 9}, {"max_new_tokens": 5}),
    ({"presence_penalty": 1, "frequency_penalty": -1.5}, {"presence_penalty": 1.0, "frequency_penalty": -1.5}),
    ({"logit_bias": {"5": -100}}, {"logit_bias": {5: -100.0}}),
    ({"seed": 12}, {"seed": 12, "sample": 0}),
    ({"stop": "\n"}, {"stop": ["\n"]}),
    ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
    ({"stop": None, "seed": None, "n": None}, {"stop": []}),
    ({"model": "tuned"}, {"adapter": "tuned"}),
    ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
    ({"logprobs": True}, {"logprobs": 0}),
    ({"user": "a", "metadata": {"b": "c"}, "store": False, "service_tier": "auto"}, {"adapter": None}),
    ({"safety_identifier": "a", "prompt_cache_key": "b", "modalities": ["text"]}, {}),
    ({"response_format": {"type": "text"}, "tool_choice": "none", "parallel_tool_calls": True}, {"grammar": None}),
    ({"extra_body": {"top_k": 40, "min_p": 0.1, "typical_p": 0.9}}, {"top_k": 40, "min_p": 0.1, "typical_p": 0.9}),
    ({"extra_body": {"top_k": -1, "repetition_penalty": 1.2}}, {"top_k": None, "repetition_penalty": 1.2}),
    ({"max_tokens": 4, "extra_body": {"min_tokens": 3, "ignore_eos": True}}, {"min_new_tokens": 3, "eos_ids": []}),
]


@pytest.mark.parametrize(("given", "asked"), WORKS, ids=lambda value: str(value)[:40])
def test_a_parameter_works(client, engine, given, asked):
    create(client, **given)
    request = engine.requests[-1]
    assert {name: getattr(request, name) for name in asked} == asked


REFUSED = {
    "temperature": [-0.1, 2.1, "1", True],
    "top_p": [0, 1.5],
    "n": [0, 65, 1.5, 10**30],
    "max_tokens": [0, -1, 2**31, "5"],
    "max_completion_tokens": [0],
    "presence_penalty": [3],
    "frequency_penalty": [-2.5],
    "logit_bias": [{"a": 1}, {"5": 101}, [1], {"-1": 1}],
    "seed": [-1, 2**32, 0.5],
    "stop": ["", ["a"] * 9, ["a" * 257], 5],
    "stream_options": [{"include_usage": True}],
    "logprobs": [3],
    "top_logprobs": [21, 5],
    "tools": [[{"type": "function"}], [{"type": "custom", "custom": {"name": "a"}}], [CLOCK], [CLOCK, CLOCK]],
    "tool_choice": ["required", {"type": "function", "function": {"name": "clock"}}],
    "response_format": [{"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": 1}}],
    "reasoning_effort": ["low"],
    "modalities": [["audio"]],
    "service_tier": ["flex"],
    "store": [True],
    # Those that OpenAI has, and this server does not.
    "audio": [{"voice": "a", "format": "mp3"}],
    "prediction": [{"type": "content", "content": "a"}],
    "functions": [[{"name": "a"}]],
    "function_call": ["auto"],
    "web_search_options": [{}],
    "verbosity": ["low"],
    "moderation": [{"model": "a"}],
    "prompt_cache_options": [{"mode": "implicit"}],
    "prompt_cache_retention": ["24h"],
    "messages": [[], [{"role": "robot", "content": "a"}], [{"role": "user"}], [{"role": "user", "content": 5}]],
    "model": ["other"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_is_refused(client, engine, name):
    before = len(engine.requests)
    for value in REFUSED[name]:
        with pytest.raises(openai.NotFoundError if name == "model" else openai.BadRequestError) as caught:
            create(client, **{name: value})
        assert caught.value.param.split(".")[0].split("[")[0] == name
        assert caught.value.type == "invalid_request_error"
        assert caught.value.body["message"].endswith(".")
    assert len(engine.requests) == before


def test_every_parameter_of_the_client_is_known_here():
    """A release of the client with another parameter shows it here."""
    from openai.types.chat import completion_create_params as params

    official = set(params.CompletionCreateParamsStreaming.__annotations__)
    named = {name for given, _ in WORKS for name in given} | REFUSED.keys()
    assert official - named <= {"stream"}


def test_log_probs(client, engine):
    engine.reply = "hé"
    (choice,) = create(client, logprobs=True, top_logprobs=2).choices
    assert [one.token for one in choice.logprobs.content] == ["h", "\ufffd", "\ufffd"]
    assert [one.bytes for one in choice.logprobs.content] == [[104], [0xC3], [0xA9]]
    assert {one.logprob for one in choice.logprobs.content} == {-0.5}
    assert [one.logprob for one in choice.logprobs.content[0].top_logprobs] == [-0.5, -1.5]
    parts = [chunk.choices[0] for chunk in create(client, logprobs=True, stream=True)]
    found = [one.token for part in parts if part.logprobs for one in part.logprobs.content]
    assert found == ["h", "\ufffd", "\ufffd"]


def test_stop_and_length(client):
    (choice,) = create(client, stop=", w").choices
    assert (choice.message.content, choice.finish_reason) == ("Hello", "stop")
    (choice,) = create(client, max_tokens=4).choices
    assert (choice.message.content, choice.finish_reason) == ("Hell", "length")
    (choice,) = create(client, max_tokens=20, extra_body={"ignore_eos": True}).choices
    assert (choice.message.content, choice.finish_reason) == ("Hello, world!" + "!" * 7, "length")


def test_messages_of_openai(client, engine):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
    ]
    answer = create(client, messages=messages).choices[0].message
    # The client's own object goes back, with all its empty fields.
    create(client, messages=[*messages, answer, {"role": "user", "content": "<|im_end|>"}])
    assert engine.tokenizer.decode(engine.requests[-1].prompt, skip_special=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\nthere<|im_end|>\n"
        "<|im_start|>assistant\nHello, world!<|im_end|>\n<|im_start|>user\n<|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # A message cannot write control tokens.
    assert list(engine.requests[-1].prompt).count(engine.tokenizer.control_tokens["<|im_end|>"]) == 4


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, "messages[0].content"),
        ({"role": "user", "content": "a", "audio": {"id": "b"}}, "messages[0].audio"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[0].tool_calls[0]"),
        (
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0]",
        ),
        ({"role": 5, "content": "a"}, "messages[0].role"),
    ],
)
def test_a_message_is_refused(client, message, place):
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, messages=[message])
    assert caught.value.param == place


def test_too_long(client, engine):
    with pytest.raises(openai.BadRequestError, match="context of 512") as caught:
        create(client, messages=[{"role": "user", "content": "a" * 600}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, max_tokens=500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="min_tokens"):
        create(client, max_tokens=5, extra_body={"min_tokens": 6})


def called(message):
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Málaga"}}\n</tool_call>'


def test_tool_calls(tools_client, tools_engine):
    tools_engine.reply = f"Let me see.{CALL}{CALL}"
    (choice,) = create(tools_client, tools=[WEATHER, CLOCK]).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert called(choice.message) == [("weather", {"city": "Málaga"})] * 2
    first, second = (call.id for call in choice.message.tool_calls)
    assert first != second
    assert re.fullmatch("[0-9a-f]{9}", first)
    assert '"weather"' in tools_engine.tokenizer.decode(tools_engine.requests[-1].prompt)
    # The answer to a call.
    result = {"role": "tool", "tool_call_id": first, "content": "snow"}
    create(tools_client, tools=[WEATHER, CLOCK], messages=[*ASKED["messages"], choice.message, result])
    prompt = tools_engine.tokenizer.decode(tools_engine.requests[-1].prompt)
    assert '"arguments": {"city": "Málaga"}' in prompt
    assert "<tool_response>\nsnow" in prompt


def test_a_stream_of_tool_calls(tools_client, tools_engine):
    tools_engine.reply = f"Let me see.{CALL}{CALL}"
    parts = [chunk.choices[0] for chunk in create(tools_client, tools=[WEATHER], stream=True)]
    calls = [call for part in parts for call in part.delta.tool_calls or ()]
    assert [call.index for call in calls] == [0, 1]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Málaga"}] * 2
    assert parts[-1].finish_reason == "tool_calls"
    # One call and no more.
    parts = [part.choices[0] for part in create(tools_client, tools=[WEATHER], stream=True, parallel_tool_calls=False)]
    assert sum(len(part.delta.tool_calls or ()) for part in parts) == 1
    assert parts[-1].finish_reason == "tool_calls"


def test_calls_without_tools_are_text(tools_client, tools_engine):
    tools_engine.reply = CALL
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        (choice,) = create(tools_client, **options).choices
        assert choice.finish_reason == "stop"
        assert choice.message.tool_calls is None
        assert choice.message.content == CALL.replace("\n", "")


def test_reasoning(tools_client, tools_engine):
    tools_engine.reply = "<think>\nHm.\n</think>\n\nYes."
    message = create(tools_client, reasoning_effort="high").choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")
    deltas = [chunk.choices[0].delta for chunk in create(tools_client, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


def schema_of(request):
    """The schema that an answer must follow."""
    text = request.grammar.source.removeprefix("start: %json ")
    schema, _ = json.JSONDecoder().raw_decode(text)
    del schema["x-guidance"]
    return schema


def test_json(client, engine):
    engine.reply = '{"a": "<think>"}'
    found = create(client, response_format={"type": "json_object"}).choices[0].message.content
    assert json.loads(found) == {"a": "<think>"}
    assert schema_of(engine.requests[-1]) == {"type": "object"}
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wrapped = {"name": "answer", "strict": True, "schema": schema}
    create(client, response_format={"type": "json_schema", "json_schema": wrapped})
    assert schema_of(engine.requests[-1]) == schema
    wrong = {"name": "answer", "schema": {"type": "wrong"}}
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, response_format={"type": "json_schema", "json_schema": wrong})
    assert caught.value.param == "response_format"


def test_a_tool_must_be_called(tools_client, tools_engine):
    tools_engine.reply = '[{"name": "clock", "arguments": {}}, {"name": "weather", "arguments": {"city": "Oslo"}}]'
    (choice,) = create(tools_client, tools=[WEATHER, CLOCK], tool_choice="required").choices
    assert called(choice.message) == [("clock", {}), ("weather", {"city": "Oslo"})]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    schema = schema_of(tools_engine.requests[-1])
    assert [call["properties"]["name"] for call in schema["items"]["anyOf"]] == [
        {"const": "weather"},
        {"const": "clock"},
    ]
    # References of a tool's schema lead to the same place as before.
    assert schema["$defs"]["tool0"]["$ref"] == "#/$defs/tool0/$defs/place"
    assert "maxItems" not in schema
    named = {"type": "function", "function": {"name": "clock"}}
    create(tools_client, tools=[WEATHER, CLOCK], tool_choice=named, parallel_tool_calls=False)
    schema = schema_of(tools_engine.requests[-1])
    assert [call["properties"]["name"] for call in schema["items"]["anyOf"]] == [{"const": "clock"}]
    assert schema["maxItems"] == 1
    # What ends too early is text.
    (choice,) = create(tools_client, tools=[CLOCK], tool_choice="required", max_tokens=9).choices
    assert (choice.message.content, choice.finish_reason) == ('[{"name":', "length")
    with pytest.raises(openai.BadRequestError) as caught:
        create(tools_client, tools=[CLOCK], response_format={"type": "json_object"}, tool_choice="required")
    assert caught.value.param == "response_format"


def test_json_or_tool_calls(tools_client, tools_engine):
    options = {"tools": [WEATHER, CLOCK], "response_format": {"type": "json_object"}}
    for stream in (False, True):
        tools_engine.reply = ' {"a": "<tool_call>"}'
        found = create(tools_client, stream=stream, **options)
        parts = [chunk.choices[0].delta for chunk in found] if stream else [found.choices[0].message]
        # The end token's name is not in it.
        assert "".join(part.content or "" for part in parts) == ' {"a": "<tool_call>"}'
        assert not any(part.tool_calls for part in parts)
        tools_engine.reply = CALL + CALL
        found = create(tools_client, stream=stream, **options)
        parts = [chunk.choices[0].delta for chunk in found] if stream else [found.choices[0].message]
        calls = [call.function for part in parts for call in part.tool_calls or ()]
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", {"city": "Málaga"})] * 2
        assert not any(part.content for part in parts)
    wrong = {**CLOCK, "function": {"name": "clock", "parameters": {"type": "wrong"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        create(tools_client, **{**options, "tools": [wrong]})
    assert caught.value.param == "tools"


def follows(grammar, tokenizer, text):
    """Whether a whole text follows a grammar."""
    guide = grammar.guide()
    for id in [*tokenizer.encode(text, add_bos=False, parse_special=True), *tokenizer.eos_ids[:1]]:
        if not guide.allowed()[id]:
            return False
        guide.push(id)
    return True


def test_the_grammar_of_json_or_calls_is_that_of_replies(tools_engine, tmp_path):
    """Each form of a call that is read may be written, and no other text."""
    city, odd = (
        '{"city": "Oslo"}',
        {"type": "function", "function": {"name": 'o"d', "parameters": {"enum": [{"a": 1}]}}},
    )
    call = f'{{"name": "weather", "arguments": {city}}}'
    bracketed = [
        f"[TOOL_CALLS] [{call}, {call}]",
        f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{city}",
        f'[TOOL_CALLS]weather[ARGS]{city}[TOOL_CALLS]o"d[ARGS]{{"a": 1}}',
    ]
    for tokenizer, forms in (
        (tools_engine.tokenizer, [f"<tool_call>{call}</tool_call>", f"\n<tool_call>\n{call}\n</tool_call>\n"]),
        (mx.load_tokenizer(tiny.write_tekken(tmp_path, "v13")), bracketed),
    ):
        body = {**ASKED, "tools": [WEATHER, odd], "response_format": {"type": "json_object"}}
        grammar = constraint_of(ChatRequest(**body), tokenizer).grammar
        assert follows(grammar, tokenizer, '{"a": 1}')
        for form in forms:
            assert follows(grammar, tokenizer, form), form
            (first, *_) = mx.parse_reply(tokenizer, form).tool_calls
            assert (first.name, first.arguments) == ("weather", {"city": "Oslo"})
        for text in ["Oslo", city + city, *(form.replace("city", "town") for form in forms)]:
            assert not follows(grammar, tokenizer, text), text
        once = constraint_of(ChatRequest(**body, parallel_tool_calls=False), tokenizer).grammar
        assert follows(once, tokenizer, forms[-1]) == (tokenizer is tools_engine.tokenizer)


def test_an_answer_that_does_not_end_well(client, engine, server):
    engine.fails = "The engine broke."
    with pytest.raises(openai.InternalServerError, match="The engine broke"):
        create(client)
    with pytest.raises(openai.APIError, match="The engine broke"):
        list(create(client, stream=True))
    engine.fails, engine.pause = None, 0.02
    with (
        serving(engine, timeout=0.05) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="-") as impatient,
    ):
        # It is not tried again, as other errors of servers are.
        before = len(engine.requests)
        with pytest.raises(openai.InternalServerError) as caught:
            create(impatient)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        assert len(engine.requests) == before + 1
