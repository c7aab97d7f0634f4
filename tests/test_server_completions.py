"""Completions, models and tokens, by the official client."""

import httpx2
import openai
import pytest
from fixtures.serving import FakeEngine, serving, tiny_tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return FakeEngine(tiny_tokenizer(tmp_path_factory.mktemp("model") / "model"), " Paris.", queue=64)


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, name="owner/tiny") as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client, prompt="France is", **options):
    return client.completions.create(model="owner/tiny", prompt=prompt, **options)


def test_a_completion(client, engine):
    found = create(client)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (" Paris.", "stop", 0, None)
    assert (found.object, found.model) == ("text_completion", "owner/tiny")
    assert found.usage.prompt_tokens == len("France is") + 1
    request = engine.requests[-1]
    assert (request.max_new_tokens, request.temperature, request.skip_special) == (16, 1.0, True)
    # The name of a control token in a prompt is text.
    create(client, "</s>")
    assert tuple(engine.requests[-1].prompt) == tuple(engine.tokenizer.encode("</s>"))


def test_a_stream(client):
    parts = [chunk.choices[0] for chunk in create(client, stream=True)]
    assert "".join(part.text for part in parts) == " Paris."
    assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    *_, usage = create(client, stream=True, stream_options={"include_usage": True})
    assert usage.usage.completion_tokens == 8


def test_several_prompts(client, engine):
    engine.reply = lambda request: f"{len(request.prompt)}/{request.sample}"
    found = create(client, ["a", "bcd"], n=2)
    assert [(choice.index, choice.text) for choice in found.choices] == [(0, "2/0"), (1, "2/1"), (2, "4/0"), (3, "4/1")]
    assert found.usage.prompt_tokens == 6
    assert create(client, [5, 6, 7]).choices[0].text == "3/0"
    assert [choice.text for choice in create(client, [[5, 6], [7]]).choices] == ["2/0", "1/0"]
    engine.reply = " Paris."


def test_echo(client):
    assert create(client, echo=True).choices[0].text == "France is Paris."
    assert "".join(chunk.choices[0].text for chunk in create(client, echo=True, stream=True)) == "France is Paris."


def test_log_probs(client):
    found = create(client, logprobs=2).choices[0].logprobs
    assert found.tokens == list(" Paris.")
    assert found.token_logprobs == [-0.5] * 7
    assert found.text_offset == list(range(7))
    assert list(found.top_logprobs[0].values()) == [-0.5, -1.5]
    parts = [chunk.choices[0].logprobs for chunk in create(client, logprobs=0, stream=True)]
    assert [token for part in parts if part for token in part.tokens] == list(" Paris.")
    assert [offset for part in parts if part for offset in part.text_offset] == list(range(7))


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "prompt": [[], 5, [[]], [5, "a"], [-1], [260], [True], {"a": 1}, ["a"] * 65],
        "suffix": ["a"],
        "best_of": [2],
        "logprobs": [21, True],
        "echo": ["yes"],
        "max_tokens": [0],
        "n": [65],
    }.items(),
)
def test_a_parameter_is_refused(client, name, values):
    for value in values:
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, **{name: value})
        assert caught.value.param in (name, "n")
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, echo=True, logprobs=1)
    assert caught.value.param == "echo"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["owner/tiny", "tuned"]
    assert client.models.retrieve("owner/tiny").id == "owner/tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_embeddings_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="owner/tiny", input="a")


def test_tokens(server, engine):
    def tokenize(**body):
        return httpx2.post(f"{server}/tokenize", json=body)

    found = tokenize(prompt="Hi").json()
    assert found == {"tokens": engine.tokenizer.encode("Hi"), "count": 3, "max_model_len": 512}
    assert tokenize(prompt="Hi", add_special_tokens=False).json()["count"] == 2
    messages = [{"role": "user", "content": "Hi"}]
    ids = tokenize(messages=messages).json()["tokens"]
    assert engine.tokenizer.decode(ids, skip_special=False).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenize(messages=messages, add_generation_prompt=False).json()["tokens"]) < len(ids)
    for wrong in ({}, {"prompt": "a", "messages": messages}, {"prompt": 5}, {"prompt": "a", "b": 1}):
        assert tokenize(**wrong).status_code == 400
