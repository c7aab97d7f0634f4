"""The server over the real engine, with a random model."""

import concurrent.futures
import json

import jax.random as jr
import openai
import pytest
from fixtures.cli import save_tiny_model
from fixtures.serving import serving

import mistral_eqx as mx
from mistral_eqx.engine import Engine


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", max_positions=512)
    return mx.load(folder), mx.load_tokenizer(folder)


@pytest.fixture(scope="module")
def server(model):
    with Engine(*model, rows=4, context=512, queue=64) as engine, serving(engine) as (address, _):
        yield address


def expected(model, prompt, new, sampler=None, key=None):
    weights, tokenizer = model
    ids = tokenizer.encode(prompt)
    options = {} if sampler is None else {"sampler": sampler, "key": key}
    out = mx.generate(weights, [ids], max_new_tokens=new, eos_id=tokenizer.eos_ids, **options)
    return tokenizer.decode(out.tokens[0, : out.lengths[0]], after=ids)


def test_many_clients_get_what_each_would_alone(model, server):
    prompts = [f"{number} is a number, and " * (1 + number % 3) for number in range(12)]

    def ask(prompt):
        with openai.OpenAI(base_url=f"{server}/v1", api_key="-", max_retries=0) as client:
            stream = client.completions.create(model="tiny", prompt=prompt, max_tokens=16, temperature=0, stream=True)
            return "".join(part.choices[0].text for part in stream)

    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        found = list(threads.map(ask, prompts))
    assert found == [expected(model, prompt, 16) for prompt in prompts]


def test_a_seed_gives_the_draws_of_generate(model, server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="-") as client:
        found = client.completions.create(model="tiny", prompt="Once", max_tokens=12, temperature=0.7, seed=5, n=2)
    for sample, choice in enumerate(found.choices):
        key = jr.fold_in(jr.key(5), sample)
        assert choice.text == expected(model, "Once", 12, mx.Sampler(temperature=0.7), key)


def test_json_follows_its_schema(server):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    clock = {"type": "function", "function": {"name": "clock", "parameters": schema}}
    with openai.OpenAI(base_url=f"{server}/v1", api_key="-") as client:
        found = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "JSON"}],
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        )
        assert json.loads(found.choices[0].message.content)["a"] in (1, 2)
        # The tiny model's template has no tools.
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "a"}], tools=[clock], tool_choice="required"
            )
        assert caught.value.param == "tools"


def test_a_client_that_goes_away_frees_its_row(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="-") as client:
        endless = {"max_tokens": 400, "extra_body": {"ignore_eos": True}, "stream": True}
        streams = [client.completions.create(model="tiny", prompt="a", **endless) for _ in range(4)]
        for stream in streams:
            next(stream)
            stream.close()
        found = client.completions.create(model="tiny", prompt="b", max_tokens=4)
        assert found.choices[0].finish_reason in ("length", "stop")
