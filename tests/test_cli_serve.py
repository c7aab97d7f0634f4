"""`mistral-eqx serve`."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys

import httpx2
import openai
import pytest
from fixtures.cli import assert_refused, run, save_tiny_model
from fixtures.lora import adapted
from fixtures.multi_host import environment, free_port

import mistral_eqx as mx


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


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
    for wrong in ("poet", "=folder", f"poet={tiny}"):
        assert_refused(run("serve", "--model", tiny, "--port", 0, "--lora", wrong))
    assert_refused(run("serve", "--model", tiny, "--port", 70000), "--port")
    assert_refused(run("serve", "--model", tiny, "--rows", 0), "--rows")
    assert_refused(run("serve", "--model", tiny, "--timeout", 0), "--timeout")
    assert_refused(run("serve", "--model", tiny, "--port", 0, "--draft", "absent.gguf"), "absent.gguf")
    assert_refused(run("serve", "--model", tiny, "--port", 0, "--draft", tiny, "--prompt-lookup"), "both propose")
    split = ("--mesh", "kv=2,rep=2", "--strategy", "heads_x_kv_seq")
    assert_refused(run("serve", "--model", tiny, "--port", 0, "--draft", tiny, *split), "kv_seq", "--prompt-lookup")
    assert_refused(run("serve", "--model", tiny / "nothing", "--port", 0), "nothing")


@pytest.mark.slow
def test_a_model_is_served(tiny, tmp_path):
    """Greedy answers are those of `generate`, of the model and of an adapter; SIGTERM ends the server."""
    tokenizer, model = mx.load_tokenizer(tiny), mx.load(tiny)
    models = {"model": model, "poet": adapted(model)}
    mx.save_lora(models["poet"], tmp_path / "poet")

    def expected(name, prompt):
        ids = tokenizer.encode(prompt)
        out = mx.generate(models[name], [ids], max_new_tokens=12, eos_id=tokenizer.eos_ids)
        return tokenizer.decode(out.tokens[0, : out.lengths[0]], after=ids)

    program = [sys.executable, "-m", "mistral_eqx", "serve", "--model", str(tiny), "--port", "0", "--rows", "2"]
    program += ["--lora", f"poet={tmp_path / 'poet'}", "--draft", str(tiny)]
    environment = {**os.environ, "MISTRAL_EQX_API_KEY": "sesame", "JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith(f"Serving {tiny} on http://127.0.0.1:"), process.stderr.read()
            address = line.split()[-1]
            with openai.OpenAI(base_url=f"{address}/v1", api_key="sesame", max_retries=0) as client:
                assert [one.id for one in client.models.list()] == ["model", "poet"]
                said = []
                for name in models:
                    for prompt in ("The capital of France is", "Once upon a time"):
                        found = client.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0)
                        assert found.choices[0].text == expected(name, prompt)
                        said.append(found.choices[0].text)
                assert len(set(said)) > 2
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


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_several_processes_serve_one_model(tiny, end):
    """The first one listens. If it is told to end, or another one dies, all end, with one sentence each at most."""
    options = ["--model", str(tiny), "--port", "0", "--mesh", "tp=2", "--quiet", "--num-processes", "2"]
    command = [sys.executable, "-m", "mistral_eqx", "serve", *options, "--coordinator", f"localhost:{free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment(1)}
    with contextlib.ExitStack() as stack:
        both = [
            stack.enter_context(subprocess.Popen([*command, "--process-id", str(number)], **pipes))
            for number in range(2)
        ]
        for process in both:
            stack.callback(process.kill)
        address = both[0].stdout.readline().split()[-1]
        with openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client:
            found = client.completions.create(model="model", prompt="Once", max_tokens=6, temperature=0)
        tokenizer = mx.load_tokenizer(tiny)
        ids = tokenizer.encode("Once")
        out = mx.generate(mx.load(tiny), [ids], max_new_tokens=6, eos_id=tokenizer.eos_ids)
        assert found.choices[0].text == tokenizer.decode(out.tokens[0, : out.lengths[0]], after=ids)
        both[end == signal.SIGKILL].send_signal(end)
        if end == signal.SIGKILL:
            # Two seconds before the end.
            while (health := httpx2.get(f"{address}/health")).status_code == 200:
                pass
            assert health.json()["reason"].startswith("Process 1 is gone")
        said = [process.communicate(timeout=60)[1] for process in both]
    codes = [process.returncode for process in both]
    if end == signal.SIGKILL:
        assert codes == [1, -signal.SIGKILL]
        assert said[0].startswith("Error: Process 1 is gone, so process 0 ends too")
    else:
        assert codes[0] == 128 + signal.SIGTERM
        assert said[0] == "Terminated.\n"
    assert all(len(lines.splitlines()) <= 1 for lines in said)
