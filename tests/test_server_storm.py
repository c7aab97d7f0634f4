"""Many clients at once, of which some break off, are slow, or send nonsense: no wrong answer, and nothing is left over.

`SERVER_REQUESTS=2000 pytest -m slow -s tests/test_server_storm.py` sends more requests.
"""

import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fixtures.cli import save_tiny_model
from fixtures.serving import serving

import mistral_eqx as mx


REQUESTS, CLIENTS = int(os.environ.get("SERVER_REQUESTS", "300")), 64
NONSENSE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"model": "tiny"}',
    b'{"model": "tiny", "prompt": "a", "max_tokens": -1}',
    b'{"model": "tiny", "prompt": "a", "max_tokens": 1e400}',
    b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
    b'{"model": "other", "prompt": "a"}',
    b'{"model": "tiny", "prompt": {"a": ' + b"[" * 5000 + b"]" * 5000 + b"}}",
    b'{"model": "tiny", "prompt": "\xff\xfe"}',
    b'{"model": "tiny", "prompt": "' + b"a" * 300_000 + b'"}',
    b'{"model": "tiny", "prompt": "a", "logit_bias": {"x": 1}}',
    os.urandom(2000),
]


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def resident():
    """Megabytes of memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Counts files in /proc.")
def test_a_storm(tmp_path):
    folder = save_tiny_model(tmp_path / "model", max_positions=512)
    model, tokenizer = mx.load(folder), mx.load_tokenizer(folder)
    prompts = [f"{'Once upon a time ' * (number % 5)}{number}" for number in range(24)]
    outs = [
        mx.generate(model, [tokenizer.encode(prompt)], max_new_tokens=12, eos_id=tokenizer.eos_ids, tokenizer=tokenizer)
        for prompt in prompts
    ]
    expected = [out.texts[0] for out in outs]
    done = collections.Counter()
    before = threading.active_count()

    def post(port, body, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json", **headers})
        return connection, connection.getresponse()

    def body(number, **more):
        asked = {"model": "tiny", "prompt": prompts[number], "max_tokens": 12, "temperature": 0, **more}
        return json.dumps(asked).encode()

    def one(port, seed):
        draw = random.Random(seed)
        number, kind = (
            draw.randrange(len(prompts)),
            draw.choice(["whole", "whole", "stream", "slow", "gone", "nonsense"]),
        )
        with contextlib.ExitStack() as closing:
            if kind == "nonsense":
                connection, response = post(port, draw.choice(NONSENSE))
                closing.callback(connection.close)
                assert 400 <= response.status < 500, response.read()
                assert json.loads(response.read())["error"]["message"]
            elif kind == "gone":
                asked = body(number, stream=True)
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(asked)}\r\n\r\n".encode()
                    # In the middle of the request, or of the answer.
                    connection.sendall((head + asked)[: draw.choice([20, len(head) + 9, len(head + asked)])])
                    if draw.random() < 0.7:
                        connection.settimeout(draw.choice([0.01, 0.2]))
                        with contextlib.suppress(TimeoutError):
                            connection.recv(draw.choice([1, 150, 400]))
            else:
                while True:
                    connection, response = post(port, body(number, stream=kind != "whole"))
                    closing.callback(connection.close)
                    if response.status != 429:
                        break
                    time.sleep(0.1)
                    done["429"] += 1
                assert response.status == 200, response.read()
                if kind == "whole":
                    text = json.loads(response.read())["choices"][0]["text"]
                else:
                    text = ""
                    for line in response:
                        if kind == "slow":
                            time.sleep(0.01)
                        if line.startswith(b"data: {"):
                            text += json.loads(line[6:])["choices"][0]["text"]
                assert text == expected[number]
        done[kind] += 1

    with (
        mx.Engine(model, tokenizer, rows=8, context=256, queue=32, chunk=32) as engine,
        serving(engine, max_body=200_000) as (address, _),
        concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool,
    ):
        port = urlsplit(address).port
        parts = [range(REQUESTS // 3), range(REQUESTS // 3, REQUESTS)]
        # Compiles, and fills what grows only once.
        list(pool.map(lambda seed: one(port, seed), parts[0]))
        files, memory = descriptors(), resident()
        list(pool.map(lambda seed: one(port, seed), parts[1]))
        end = time.monotonic() + 20
        while (load := engine.load).active or load.waiting:
            assert time.monotonic() < end, "a request is left behind"
            time.sleep(0.05)
        time.sleep(0.5)
        grown = descriptors() - files, resident() - memory
    print(f"{sum(done.values())} requests: {dict(done)}; files {grown[0]:+}, memory {grown[1]:+.1f} MB; {load}")  # noqa: T201
    assert threading.active_count() == before
    assert grown[0] <= CLIENTS
    # The prefix cache may still grow.
    assert grown[1] - load.prefix_bytes / 2**20 < 40
    assert done["whole"] > 0
    assert done["gone"] > 0
