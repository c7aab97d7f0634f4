"""`mistral-eqx serve`."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys

import openai
import pytest
from fixtures.cli import assert_refused, run, save_tiny_model

import mistral_eqx as mx


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def test_help_says_where_it_listens():
    help = run("serve", "--help").stdout
    assert "127.0.0.1" in help
    assert "MISTRAL_EQX_API_KEY" in help


def test_without_the_extra(monkeypatch, tiny):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else find(name, *more)
    )
    assert_refused(run("serve", "--model", tiny), "pip install 'mistral-eqx[serve]'")


def test_what_is_refused_before_the_weights_are_read(tiny):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert_refused(run("serve", "--model", tiny, "--port", taken.getsockname()[1]), "in use", "--host")
    assert_refused(run("serve", "--model", tiny, "--api-key", " "), "--api-key is empty")
    assert_refused(run("serve", "--model", tiny, "--port", 70000), "--port")
    assert_refused(run("serve", "--model", tiny, "--rows", 0), "--rows")
    assert_refused(run("serve", "--model", tiny, "--timeout", 0), "--timeout")
    assert_refused(run("serve", "--model", tiny / "nothing", "--port", 0), "nothing")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_model_is_served(tiny):
    """Greedy answers are those of `generate`; SIGTERM ends the server."""
    tokenizer, model = mx.load_tokenizer(tiny), mx.load(tiny)
    program = [sys.executable, "-m", "mistral_eqx", "serve", "--model", str(tiny), "--port", "0", "--rows", "2"]
    environment = {**os.environ, "MISTRAL_EQX_API_KEY": "sesame", "JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith(f"Serving {tiny} on http://127.0.0.1:"), process.stderr.read()
            address = line.split()[-1]
            with openai.OpenAI(base_url=f"{address}/v1", api_key="sesame", max_retries=0) as client:
                assert [one.id for one in client.models.list()] == ["model"]
                for prompt in ("The capital of France is", "Once upon a time"):
                    found = client.completions.create(model="model", prompt=prompt, max_tokens=12, temperature=0)
                    ids = tokenizer.encode(prompt)
                    out = mx.generate(model, [ids], max_new_tokens=12, eos_id=tokenizer.eos_ids)
                    assert found.choices[0].text == tokenizer.decode(out.tokens[0, : out.lengths[0]], after=ids)
                messages = [{"role": "user", "content": "Hi"}]
                stream = client.chat.completions.create(model="model", messages=messages, max_tokens=5, stream=True)
                assert [part.choices[0].finish_reason for part in stream][-1] in ("length", "stop")
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "POST /v1/completions 200" in err
    assert err.endswith("Terminated.\n")
    assert process.returncode == 128 + signal.SIGTERM
