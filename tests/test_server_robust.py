"""Many clients, well-behaved and not, over the real engine: each answer is right, and nothing is left behind."""

import asyncio
import collections
import gc
import json
import os
import random
import socket
import struct
import threading
import time

import jax.random as jr
import pytest
from fixtures.cli import save_tiny_model
from fixtures.serving import serving

import mistral_eqx as mx
from mistral_eqx.engine import Engine


# `ROBUST_REQUESTS=2000` asks for more.
REQUESTS, CLIENTS = int(os.environ.get("ROBUST_REQUESTS", "300")), 64
PROMPTS, NEW, LARGEST = 16, 24, 50_000
KINDS = ("whole", "stream", "slow", "gone", "gone from a stream", "reset", "wrong", "large", "begun", "too long")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", max_positions=256)
    return mx.load(folder), mx.load_tokenizer(folder)


def body(number, **options):
    """The body of a prompt; every second one is sampled."""
    prompt = f"{number} " * (1 + number % 5)
    sampled = {"temperature": 0.8, "seed": number} if number % 2 else {"temperature": 0}
    return {"prompt": prompt, "max_tokens": NEW, **sampled, **options}


def expected(model, number):
    weights, tokenizer = model
    ids = tokenizer.encode(body(number)["prompt"])
    sampled = {"sampler": mx.Sampler(temperature=0.8), "key": jr.fold_in(jr.key(number), 0)} if number % 2 else {}
    out = mx.generate(weights, [ids], max_new_tokens=NEW, eos_id=tokenizer.eos_ids, **sampled)
    return tokenizer.decode(out.tokens[0, : out.lengths[0]], after=ids)


class Client:
    """One request in plain HTTP."""

    def __init__(self, port, draw):
        self.port, self.draw = port, draw

    async def send(self, content, length=None):
        """Connects, and sends a body that is said to have a length."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        head = f"content-length: {len(content) if length is None else length}\r\nconnection: close\r\n\r\n"
        self.writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n" + head.encode()
        )
        self.writer.write(content)
        await self.writer.drain()

    async def receive(self, slowly=False):
        """The status, and the body without its lengths of parts."""
        found = b""
        while part := await self.reader.read(40 if slowly else 2**16):
            found += part
            await asyncio.sleep(0.001 if slowly else 0)
        self.writer.close()
        head, _, content = found.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            parts, content = content, b""
            while parts:
                size, _, parts = parts.partition(b"\r\n")
                content, parts = content + parts[: int(size, 16)], parts[int(size, 16) + 2 :]
        return int(head.split()[1]), content.decode()

    async def leave(self, abruptly):
        """Goes away, by a reset of the connection or by its end."""
        if abruptly:
            connection = self.writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()

    async def act(self, kind, number):
        """Does what a kind of clients does; returns a text if it waited for one."""
        draw = self.draw
        if kind == "whole":
            await self.send(body(number))
            status, content = await self.receive()
            assert status == 200
            return json.loads(content)["choices"][0]["text"]
        if kind in ("stream", "slow"):
            await self.send(body(number, stream=True))
            status, content = await self.receive(slowly=kind == "slow")
            assert status == 200
            *events, done = [line.removeprefix("data: ") for line in content.split("\n\n") if line]
            assert done == "[DONE]"
            return "".join(json.loads(event)["choices"][0]["text"] for event in events)
        if kind == "gone":
            await self.send(body(number, n=draw.randint(1, 3)))
            await asyncio.sleep(draw.uniform(0, 0.2))
            await self.leave(draw.random() < 0.5)
        elif kind in ("gone from a stream", "reset"):
            await self.send(body(number, stream=True))
            await self.reader.read(draw.randint(1, 1000))
            await self.leave(kind == "reset")
        elif kind == "begun":
            await self.send(b'{"prompt"', length=1000)
            await asyncio.sleep(draw.uniform(0, 0.1))
            await self.leave(draw.random() < 0.5)
        else:
            good = json.dumps(body(number)).encode()
            wrong = good[: draw.randrange(len(good))] + draw.randbytes(draw.randint(0, 20))
            content = {"wrong": wrong, "large": b" " * (2 * LARGEST), "too long": body(number, max_tokens=200 + 60)}[
                kind
            ]
            await self.send(content)
            status, content = await self.receive()
            assert status == (413 if kind == "large" else 400), content
            assert json.loads(content)["error"]["message"]
        return None


def left():
    """The files, threads and megabytes of this process, after what ends has ended."""
    time.sleep(0.2)
    gc.collect()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), threading.active_count(), resident // 2**20


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts files as Linux has them")
def test_nothing_is_left_of_many_clients(model):
    texts = [expected(model, number) for number in range(PROMPTS)]
    assert len(set(texts)) > PROMPTS / 2
    draw, done, wrong = random.Random(0), collections.Counter(), []

    async def all_clients(port, count):
        free = asyncio.Semaphore(CLIENTS)

        async def one(kind, number):
            async with free:
                text = await Client(port, draw).act(kind, number)
                done[kind] += 1
                if text is not None and text != texts[number]:
                    wrong.append((kind, number, text))

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(one(draw.choice(KINDS), draw.randrange(PROMPTS)))

    with Engine(*model, rows=8, context=256, queue=2000) as engine:
        with serving(engine, max_body=LARGEST) as (address, app):
            port = int(address.rpartition(":")[2])
            # Threads, programs and kept prefixes that stay are made now.
            asyncio.run(all_clients(port, 4 * CLIENTS))
            before = left()
            asyncio.run(all_clients(port, REQUESTS))
            end = time.monotonic() + 20
            while (engine.load.active, engine.load.waiting, app.state.service.active) != (0, 0, 0):
                assert time.monotonic() < end, (engine.load, app.state.service.active)
                time.sleep(0.01)
            after = left()
        # Shown with `-s`.
        print(f"{sum(done.values())} requests: {dict(done)}; files, threads and MB {before} and {after}")  # noqa: T201
        assert not wrong
        assert sum(done.values()) == REQUESTS + 4 * CLIENTS
        assert engine.load.finished["cancelled"] > 0
        # A pool of threads may have grown meanwhile.
        assert after[0] <= before[0] + 2
        assert after[1] <= before[1] + 8
        # 2000 requests added 2 MB; one that keeps its 256 slots would add 64 kB.
        assert after[2] <= before[2] + 16
