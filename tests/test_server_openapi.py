"""Requests that schemathesis makes from the OpenAPI document: right ones, and wrong in ways that it describes."""

import collections
import os

import hypothesis
import pytest
import schemathesis
from fixtures.serving import FakeEngine, serving
from fixtures.text import templates, tiny
from schemathesis import GenerationMode

import mistral_eqx as mx


RIGHT = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "Hello"},
    "/tokenize": {"prompt": "Hello", "messages": None},
}


def asking(right, found):
    def ask(case):
        if right is not None and isinstance(case.body, dict):
            # What the document leaves open: the names of models, and the form of messages.
            case.body.pop("model", None)
            case.body.update(right)
        response = case.call()
        found[response.status_code] += 1
        assert response.status_code < 500, case.as_curl_command()
        if response.status_code >= 400:
            # OpenAI's form.
            assert {"message", "type", "param", "code"} <= set(response.json()["error"])

    return ask


@pytest.mark.slow
def test_each_request_is_answered_or_refused(tmp_path):
    metadata = tiny.byte_level_metadata(chat_template=templates.HERMES)
    tokenizer = mx.load_tokenizer(tiny.write_gguf(tmp_path / "tiny.gguf", **metadata))
    found = collections.Counter()
    limits = hypothesis.settings(
        max_examples=int(os.environ.get("OPENAPI_EXAMPLES", "30")),
        deadline=None,
        suppress_health_check=[*hypothesis.HealthCheck],
        derandomize=True,
        database=None,
    )
    with serving(FakeEngine(tokenizer, context=2048, queue=10**6)) as (address, _):
        document = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = [one.ok() for one in document.get_all_operations()]
        assert len(operations) == 8

        for operation in operations:
            # What takes nothing has no wrong request.
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
                cases = operation.as_strategy(generation_mode=mode)
                right = RIGHT.get(operation.path, {}) if mode is GenerationMode.POSITIVE else None
                limits(hypothesis.given(cases)(asking(right, found)))()
    assert min(found[200], found[400]) > found.total() / 10
