"""How fast does the server answer many clients, and how long does each wait?

A load generator, in a process of its own, speaks to `mistral-eqx serve` over loopback. Clients ask all at once, each
again as soon as it has its answer, or at random times (a Poisson process). Beside it are `mx.generate` with as many
rows and `mx.stream`, without a server, and the server of llama-cpp-python with the same GGUF file, if it is installed.

    python benchmarks/serve.py --json serve.json
    python benchmarks/serve.py --write

The second puts the tables into the README beside this file, and a plot into `docs/` (extra `plot`). Run nothing beside
it. It needs the extra `serve`.
"""

import argparse
import contextlib
import dataclasses
import http.client
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rounds import (
    MODEL,
    TIMES,
    exported_weights,
    find_left_out,
    footnote,
    in_own_process,
    keep,
    llama_cpp_notes,
    make_report,
    options,
    positive,
    prompt_ids,
    table,
    usable_cores,
    use_cpu,
)


PROMPT_TOKENS, CLIENTS = 64, (1, 2, 4, 8, 16)
OURS, THEIRS = "mistral-eqx serve", "llama-cpp-python's server"
DOCS = Path(__file__).parents[1] / "docs"


@dataclasses.dataclass(frozen=True)
class Asked:
    """One answer, as a client saw it: when it was asked for, when each piece came, and the number of its tokens."""

    start: float
    times: list[float]
    tokens: int

    @property
    def first(self) -> float:
        return self.times[0] - self.start

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def ask(port: int, prompt: str, new_tokens: int, end: int) -> Asked:
    """Asks for one streamed answer, in which the end token is as good as forbidden."""
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
        "logit_bias": {str(end): -100},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start, times = time.perf_counter(), []
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {response.read().decode()}")
    for line in response:
        if line.startswith(b"data: {") and (choices := json.loads(line[6:])["choices"]) and choices[0]["text"]:
            times.append(time.perf_counter())
    connection.close()
    return Asked(start, times, new_tokens)


def load(
    port: int, prompts: list[str], clients: int, new_tokens: int, end: int, rate: float | None, seed: int
) -> dict[str, Any]:
    """Lets clients ask: each prompt once. With a `rate`, requests come at random times, so many a second."""
    answers: list[Asked] = []
    waiting, lock, draw = list(prompts), threading.Lock(), random.Random(seed)

    def client():
        while True:
            with lock:
                if not waiting:
                    return
                prompt = waiting.pop()
            answers.append(ask(port, prompt, new_tokens, end))

    def one(prompt: str):
        answers.append(ask(port, prompt, new_tokens, end))

    begin, threads = time.perf_counter(), []
    if rate is None:
        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
    else:
        for prompt in prompts:
            threads.append(threading.Thread(target=one, args=(prompt,)))
            threads[-1].start()
            time.sleep(draw.expovariate(rate))
    for thread in threads:
        thread.join()
    if len(answers) < len(prompts):
        raise RuntimeError(f"{len(prompts) - len(answers)} of {len(prompts)} requests failed.")
    gaps = [gap for answer in answers for gap in answer.gaps]
    firsts = [answer.first for answer in answers]
    return {
        "rate": sum(answer.tokens for answer in answers) / (time.perf_counter() - begin),
        "first": statistics.median(firsts),
        "first_most": max(firsts),
        "gap": statistics.median(gaps),
        "gap_99": statistics.quantiles(gaps, n=100)[98],
    }


def same_beginning(port: int, prompts: list[str], end: int) -> dict[str, float]:
    """The first token of two requests with the same long beginning, one after the other."""
    first, second = (ask(port, prompt, 2, end).first for prompt in prompts)
    return {"first": first, "second": second, "ratio": second / first}


@contextlib.contextmanager
def serving(command: list[str]) -> Iterator[int]:
    """A server that answers, on the port that is appended to the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log, subprocess.Popen([*command, str(port)], stdout=log, stderr=log) as process:
        try:
            until = time.monotonic() + 180
            while True:
                with contextlib.suppress(OSError):
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                    connection.request("GET", "/v1/models")
                    if connection.getresponse().status == 200:
                        break
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"The server did not start: {log.read().decode()[-2000:]}")
                time.sleep(0.2)
            yield port
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def commands(file: Path, rows: int, context: int) -> dict[str, list[str]]:
    """How each server is started; the port comes last."""
    llama = ["--n_ctx", str(context), "--n_threads", str(usable_cores()), "--n_threads_batch", str(usable_cores())]
    return {
        OURS: [
            *(sys.executable, "-m", "mistral_eqx", "serve", "--model", str(file), "--name", MODEL),
            *("--rows", str(rows), "--context", str(context), "--port"),
        ],
        THEIRS: [sys.executable, "-m", "llama_cpp.server", "--model", str(file), *llama, "--port"],
    }


def measure(name: str, command: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """One server: after a round that compiles, each number of clients, random arrivals, and a known beginning."""
    new, end, found = given["new_tokens"], given["end"], {}
    with serving(command) as port:
        load(port, given["prompts"], given["most"], new, end, None, 0)
        for clients in (count for count in CLIENTS if count <= given["most"]):
            prompts = given["prompts"][: max(given["requests"] * clients, 2)]
            found[f"{clients}"] = load(port, prompts, clients, new, end, None, 0)
            print(f"{name}, {clients} clients: {found[f'{clients}']}", file=sys.stderr)
        # Half of what the server did at most.
        rate = found[f"{given['most']}"]["rate"] / new / 2
        found["random"] = load(port, given["prompts"], given["most"], new, end, rate, 1)
        for number in range(2):
            found["beginning"] = same_beginning(port, given["long"][2 * number : 2 * number + 2], end)
        print(f"{name}, same beginning: {found['beginning']}", file=sys.stderr)
    return found


def without_server(file: Path, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Tokens/s of `mx.generate` with all prompts in one batch, and of `mx.stream` with one, prefill included."""
    import mistral_eqx as mx

    model, rates = mx.load(file), {}
    for name, rows, call in (("generate", prompts, mx.generate), ("stream", prompts[:1], mx.stream)):
        for _ in range(2):
            begin = time.perf_counter()
            out = call(model, rows, max_new_tokens=new_tokens, eos_id=())
            _ = out.tokens.block_until_ready() if name == "generate" else list(out)
            rates[name] = len(rows) * new_tokens / (time.perf_counter() - begin)
    return rates


def markdown(report: dict[str, Any]) -> str:
    """The tables and what one must know to read them."""
    measured = report["measured"]
    header = ["", "clients", "tokens/s", TIMES, "first token, s", "most, s", "between tokens, ms", "99 %, ms"]
    lines = [header]
    for name, found in measured.items():
        for key, one in found.items():
            if key == "beginning":
                continue
            base = measured.get(THEIRS, {}).get(key)
            ratio = f"{one['rate'] / base['rate']:.2f}" if base and name == OURS else ""
            times = [f"{one['first']:.2f}", f"{one['first_most']:.2f}", f"{one['gap'] * 1e3:.1f}"]
            lines.append([name, key, f"{one['rate']:.1f}", ratio, *times, f"{one['gap_99'] * 1e3:.1f}"])
    beginnings = [["", "first, s", "second, s", TIMES]] + [
        [name, f"{one['first']:.2f}", f"{one['second']:.2f}", f"{one['ratio']:.2f}"]
        for name, found in measured.items()
        for one in [found["beginning"]]
    ]
    alone = report["alone"]
    how = (
        f"Prompts of {PROMPT_TOKENS} tokens, {report['new_tokens']} new ones, Q4_1; without a server, prefill "
        f"included: mx.generate with {report['clients']} rows {alone['generate']:.1f} tokens/s, mx.stream with one "
        f"{alone['stream']:.1f}. The second table: the first token of two requests with the same 1000 tokens before it."
    )
    notes = footnote(report, how, *llama_cpp_notes(report))
    return f"{table(lines)}\n\n{table(beginnings)}\n\n{notes}"


def plot(report: dict[str, Any], folder: Path):
    """Throughput, and the time between tokens, by the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    throughput, wait = figure.subplots(1, 2)
    for name, found in report["measured"].items():
        counts = [key for key in found if key.isdigit()]
        clients = [int(key) for key in counts]
        throughput.plot(clients, [found[key]["rate"] for key in counts], marker="o", label=name)
        wait.plot(clients, [found[key]["first"] for key in counts], marker="o", label=name)
    throughput.axhline(report["alone"]["generate"], color="grey", linestyle=":", label="mx.generate, one batch")
    for axes, title in ((throughput, "tokens/s"), (wait, "first token, s")):
        axes.set(xlabel="clients", title=title, ylim=(0, None), xscale="log")
        axes.set_xticks([count for count in CLIENTS if count <= report["clients"]], minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    throughput.legend(fontsize=8)
    figure.savefig(folder / "serving_load.png", dpi=120)


def main():
    parser = options(__doc__, rounds=1, repetitions=None)
    parser.add_argument("--clients", type=positive, default=8, help="the most clients, and the server's rows (8)")
    parser.add_argument("--requests", type=positive, default=3, help="of each client (3)")
    parser.add_argument("--new-tokens", type=positive, default=64, help="of each answer (64)")
    arguments: argparse.Namespace = parser.parse_args()
    use_cpu()
    ids = prompt_ids()
    import mistral_eqx as mx

    tokenizer = mx.load_tokenizer(MODEL)
    count = arguments.clients * arguments.requests
    slices = [ids[7 * number : 7 * number + PROMPT_TOKENS] for number in range(count)]
    begin = tokenizer.decode((ids * 3)[:1000])
    given = {
        "prompts": [tokenizer.decode(one) for one in slices],
        "long": [f"{number}. {begin}{end}" for number in range(2) for end in (" First", " Second")],
        "most": arguments.clients,
        "requests": arguments.requests,
        "new_tokens": arguments.new_tokens,
        "end": tokenizer.eos_ids[0],
    }
    needs = {OURS: ("fastapi", "uvicorn"), THEIRS: ("llama_cpp", "starlette_context", "pydantic_settings")}
    left_out = find_left_out(needs)
    measured = {}
    with exported_weights() as weights:
        for name, command in commands(weights.file, arguments.clients, 2048).items():
            if name not in left_out:
                measured[name] = in_own_process(measure, name, command, given)
        batch = slices[: arguments.clients]
        alone = in_own_process(without_server, weights.file, batch, arguments.new_tokens)
    report = make_report(arguments, measured, [0.0], left_out=left_out, alone=alone)
    keep(report, markdown(report), "serve", arguments)
    if arguments.write:
        plot(report, DOCS)
    print(markdown(report))


if __name__ == "__main__":
    main()
