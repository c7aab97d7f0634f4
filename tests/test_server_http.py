"""What a server bears: wrong bodies, keys, clients that go away, full queues, and its own end."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import openai
import pytest
from fixtures.serving import FakeEngine, serving, tiny_tokenizer
from prometheus_client.parser import text_string_to_metric_families

from mistral_eqx.errors import InputError
from mistral_eqx.server import create_app, listen


ASKED = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return FakeEngine(tiny_tokenizer(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, max_body=100_000) as (address, _):
        yield address


@pytest.fixture(autouse=True)
def same_reply(engine):
    engine.reply, engine.pause, engine.queue = "Hello!", 0.0, 8
    yield
    engine.wait()


def post(address, content, path="/v1/chat/completions", **headers):
    headers = {"content-type": "application/json", **headers}
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx2.post(address + path, content=content, headers=headers)


def with_user(text):
    return b'{"messages": [{"role": "user", "content": "%s"}]}' % text


def with_more(parameters):
    return b'{"messages": [{"role": "user", "content": "a"}], ' + parameters + b"}"


HOSTILE = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[1]",
    "null": b"null",
    "a number": b"5",
    "twice": b'{"n": 1, "n": 2, "messages": []}',
    "NaN": b'{"messages": [], "temperature": NaN}',
    "infinity": b'{"messages": [], "temperature": 1e999}',
    "digits": b'{"messages": [], "seed": ' + b"9" * 50_000 + b"}",
    "large": with_more(b'"temperature": 1' + b"0" * 400),
    "deep": b'{"messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "deep content": b'{"messages": [{"role": "user", "content": ' + b"[" * 50 + b"]" * 50 + b"}]}",
    "bytes": with_user(b"\xff\xfe"),
    "null byte": b"\0" * 100,
    "UTF-16": json.dumps(ASKED).encode("utf-16"),
    "half a character": with_user(b"\\ud800"),
    "half a character in a stop string": with_more(b'"stop": "\\ud800"'),
    "half a character in a key": with_more(b'"\\ud800": 1'),
    "a model that is a number": with_more(b'"model": 5'),
    "half a character in a tool": with_more(b'"tools": [{"\\ud800": "\\udfff"}]'),
    "a tool that is a list": with_more(b'"tools": [[]]'),
    "a tool that is a number": with_more(b'"tools": [1]'),
    "a message that is a text": b'{"messages": ["a"]}',
    "messages that are an object": b'{"messages": {"role": "user"}}',
    "an empty part": b'{"messages": [{"role": "user", "content": [{}]}]}',
    "calls that are an object": b'{"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}',
    "a name that is an object": b'{"messages": [{"role": "user", "content": "a", "name": {"a": [1]}, "b": 1}]}',
    "a format that is a list": with_more(b'"response_format": []'),
    "a format of a format": with_more(b'"response_format": {"type": {}}'),
    "a choice that is a list": with_more(b'"tools": [{}], "tool_choice": []'),
    "a long number in a bias": b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"'
    + b"9" * 400
    + b'": 1}}',
    "a bias outside the vocabulary": with_more(b'"logit_bias": {"999": 1}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_wrong_body_is_refused(server, engine, name):
    before = len(engine.answers)
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
        found = post(server, HOSTILE[name], path)
        assert found.status_code == 400, found.text
        error = found.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) < 1100
    assert len(engine.answers) == before


def test_a_body_of_another_type_is_refused(server):
    # Such bodies come from pages of other sites without the browser asking.
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert post(server, ASKED, **{"content-type": kind}).status_code == 415
    assert post(server, ASKED, **{"content-type": "application/json; charset=utf-8"}).status_code == 200


def test_a_large_body_is_refused(server):
    found = post(server, with_user(b"a" * 200_000))
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")

    def parts():
        for _ in range(50):
            yield b" " * 10_000

    # Without a length in its header.
    found = httpx2.post(f"{server}/v1/completions", content=parts(), headers={"content-type": "application/json"})
    assert found.status_code == 413


def test_other_paths(server):
    found = httpx2.get(f"{server}/v1/nothing")
    assert (found.status_code, found.json()["error"]["message"]) == (404, "There is no /v1/nothing here.")
    assert httpx2.get(f"{server}/v1/completions").status_code == 405
    assert httpx2.get(f"{server}/docs").status_code == 404
    document = httpx2.get(f"{server}/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "top_k", "stream_options"} <= body["properties"].keys()
    assert "$ref" not in json.dumps(body)


def test_the_page(server):
    found = httpx2.get(f"{server}/")
    assert found.headers["content-type"] == "text/html; charset=utf-8"
    policy = found.headers["content-security-policy"]
    assert policy.startswith(
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
    )
    assert "img-src data:" in policy
    assert found.headers["x-content-type-options"] == "nosniff"


def test_keys(engine):
    with serving(engine, api_key="sesame-ä") as (address, _):
        for path in ("/", "/health"):
            assert httpx2.get(address + path).status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            assert httpx2.get(address + path).status_code == 401
        for key in ("wrong", "sesame", ""):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key or "-") as client:
                with pytest.raises(openai.AuthenticationError) as caught:
                    client.chat.completions.create(model="tiny", **ASKED)
                assert caught.value.code == "invalid_api_key"
        right = {"authorization": "bearer sesame-ä".encode()}
        assert httpx2.get(f"{address}/v1/models", headers=right).status_code == 200
    with pytest.raises(InputError, match="empty"):
        create_app(engine, name="tiny", api_key=" ")


def test_origins_and_hosts(server, engine):
    origin = {"origin": "https://example.org"}
    asks = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    assert "access-control-allow-origin" not in httpx2.get(f"{server}/health", headers=origin).headers
    assert httpx2.options(f"{server}/v1/completions", headers=asks).status_code == 405
    with serving(engine, allow_origins=["https://example.org"], api_key="a", hosts=("127.0.0.1",)) as (address, _):
        assert httpx2.options(f"{address}/v1/completions", headers=asks).status_code == 200
        found = httpx2.get(f"{address}/v1/models", headers=origin)
        assert (found.status_code, found.headers["access-control-allow-origin"]) == (401, "https://example.org")
        for host in ("evil.example", "127.0.0.1.evil.example:80", "[", ""):
            assert httpx2.get(f"{address}/health", headers={"host": host}).status_code == 403


def test_a_full_queue(server, engine):
    engine.queue, engine.pause = 1, 0.05
    with openai.OpenAI(base_url=f"{server}/v1", api_key="-", max_retries=0) as client:
        first = client.chat.completions.create(model="tiny", stream=True, **ASKED)
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(model="tiny", stream=stream, **ASKED)
            assert caught.value.code == "queue_full"
            assert int(caught.value.response.headers["retry-after"]) > 0
        # Of several choices all wait or none.
        first.close()
        engine.wait()
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="tiny", n=2, **ASKED)
        engine.wait()
        assert engine.finished[-1] == "cancelled"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(server, engine, stream):
    engine.reply, engine.pause = "a" * 400, 0.05
    before = len(engine.answers)
    body = json.dumps({**ASKED, "stream": stream, "n": 2}).encode()
    address = server.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body)
        )
        end = time.monotonic() + 5
        while len(engine.answers) < before + 2:
            assert time.monotonic() < end
            time.sleep(0.005)
        if stream:
            assert b"200 OK" in connection.recv(100)
    # All 400 tokens would take 20 seconds.
    engine.wait(8)
    assert engine.finished[-2:] == ["cancelled"] * 2


def test_a_client_that_never_sends_its_body_holds_no_row(server, engine):
    before = len(engine.answers)
    address = server.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{"
        )
    assert post(server, ASKED).status_code == 200
    assert len(engine.answers) == before + 1


def test_answers_do_not_mix(server, engine):
    engine.queue, engine.pause = 64, 0.001
    engine.reply = lambda request: engine.tokenizer.decode(request.prompt[-60:]) * 2
    found = {}

    def ask(number):
        text = f"secret {number:03} "
        with openai.OpenAI(base_url=f"{server}/v1", api_key="-") as client:
            stream = client.completions.create(model="tiny", prompt=text, max_tokens=200, stream=number % 2 == 0)
            choices = [part.choices[0] for part in stream] if number % 2 == 0 else stream.choices
        found[text] = "".join(choice.text for choice in choices)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    assert all(text == prompt * 2 for prompt, text in found.items())


def test_prompts_stay_out_of_the_log(engine, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    secret = "the password is swordfish"
    body = {"messages": [{"role": "user", "content": secret}]}

    def use(address):
        assert post(address, body).status_code == 200
        assert post(address, {**body, "stream": True}).status_code == 200
        assert post(address, {**body, "n": 0}).status_code == 400
        assert post(address, {"messages": [{"role": secret, "content": secret}]}).status_code == 400
        assert post(address, secret.encode()).status_code == 400
        httpx2.get(f"{address}/{secret}?{secret}")

    def fail(*arguments):
        raise RuntimeError(secret)

    with serving(engine) as (address, app):
        use(address)
        app.state.service.submit = fail
        found = post(address, body)
        assert (found.status_code, found.json()["error"]["code"]) == (500, "internal_error")
        assert "swordfish" not in found.text
    said = caplog.text + "".join(capfd.readouterr())
    assert "POST /v1/chat/completions 200" in said
    assert "A fault: RuntimeError at" in said
    # The client's own log has the address with the secret in it.
    assert not [record for record in caplog.records if record.name != "httpx2" and "swordfish" in record.getMessage()]
    caplog.clear()
    with serving(engine, log_prompts=True) as (address, _):
        use(address)
    assert [record.name for record in caplog.records if "swordfish" in record.getMessage()].count(
        "mistral_eqx.server"
    ) == 2


def test_metrics(engine):
    with serving(engine) as (address, _):
        post(address, {**ASKED, "n": 2})
        post(address, {**ASKED, "n": 0})
        httpx2.get(f"{address}/anything")
        found = httpx2.get(f"{address}/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(found.text)
        for sample in family.samples
    }
    chat = ("mistral_eqx_requests_total", "/v1/chat/completions")
    assert (samples[*chat, "200"], samples[*chat, "400"]) == (1, 1)
    assert samples["mistral_eqx_requests_total", "other", "404"] == 1
    assert samples["mistral_eqx_rows",] == engine.rows
    assert samples["mistral_eqx_new_tokens_total",] == engine.new_tokens
    assert samples["mistral_eqx_answers_total", "stop"] == engine.finished.count("stop")
    # One request has one first token of each choice; "Hello!" and the end are seven tokens.
    assert samples["mistral_eqx_first_token_seconds_count",] == 2
    assert samples["mistral_eqx_between_tokens_seconds_count",] == 12


def test_health(engine, monkeypatch):
    troubles = []
    with serving(engine, trouble=lambda: troubles[0] if troubles else None) as (address, app):
        assert httpx2.get(f"{address}/health").json() == {"status": "ok", "active": 0, "waiting": 0}
        troubles.append("Process 1 is gone.")
        found = httpx2.get(f"{address}/health")
        assert (found.status_code, found.json()) == (503, {"status": "failed", "reason": "Process 1 is gone."})
        troubles.clear()
        app.state.service.draining = True
        assert httpx2.get(f"{address}/health").status_code == 503
        found = post(address, ASKED)
        assert (found.status_code, found.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in found.headers
        app.state.service.draining = False

        def fail(engine):
            raise RuntimeError("The engine has failed.")

        monkeypatch.setattr(FakeEngine, "load", property(fail))
        found = httpx2.get(f"{address}/health")
        assert (found.status_code, found.json()["reason"]) == (503, "The engine has failed.")


def test_an_address_that_is_taken():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(InputError, match="give another host or port"):
            listen("127.0.0.1", taken.getsockname()[1])
    for host in ("", "no.such.host.invalid", "a\ud800"):
        if host:
            with pytest.raises(InputError):
                listen(host, 0)


SERVES = """
import sys
from pathlib import Path
from fixtures.serving import FakeEngine, tiny_tokenizer
from mistral_eqx import interrupts
from mistral_eqx.server import create_app, listen, run, url

interrupts.stand_by()
engine = FakeEngine(tiny_tokenizer(Path(sys.argv[1])), "a" * 40, pause=float(sys.argv[2]))
taken = listen("127.0.0.1", 0)
try:
    run(create_app(engine, name="tiny"), taken, drain=float(sys.argv[3]), ready=lambda: print(url(taken), flush=True))
except KeyboardInterrupt:
    print(engine.finished, flush=True)
    interrupts.leave()
"""


@pytest.mark.parametrize(
    ("pause", "drain", "text", "finish"),
    [(0.05, 30, "a" * 40, "stop"), pytest.param(0.5, 3, "a", "cancelled", marks=pytest.mark.slow)],
)
def test_sigterm_drains(tmp_path, pause, drain, text, finish):
    """An answer comes to its end if there is time; a new request is refused meanwhile."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-c", SERVES, str(tmp_path / "model"), str(pause), str(drain)]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            address = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address), process.stderr.read()
            with openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client:
                stream = client.completions.create(model="tiny", prompt="b", max_tokens=50, stream=True)
                said = next(stream).choices[0].text
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                assert httpx2.get(f"{address}/health").json() == {"status": "draining"}
                with pytest.raises(openai.InternalServerError, match="takes no more requests"):
                    client.completions.create(model="tiny", prompt="b")
                cut = finish == "cancelled"
                with pytest.raises(openai.APIError, match="The server ends") if cut else contextlib.nullcontext():
                    for part in stream:
                        said += part.choices[0].text
                assert said.startswith(text)
                assert (said != text) == cut
            out, err = process.communicate(timeout=10)
        finally:
            process.kill()
    assert out == f"['{finish}']\n"
    assert err == "Terminated.\n"
    assert process.returncode == 128 + signal.SIGTERM
