"""Processes on this machine that stand for hosts, and what each of them does when this file is run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


# 8 key/value heads on 16 devices, as on a TPU v4-32; two processes' devices share what the vocabulary is split into.
SIZES = {
    "vocab": 96,
    "embed": 32,
    "hidden": 64,
    "layers": 2,
    "kv_heads": 8,
    "q_per_kv": 2,
    "head_dim": 8,
    "rope_theta": 1e4,
    "norm_eps": 1e-5,
    "max_positions": 64,
    "windows": (None, 6),
}
PROMPTS = [[5, 17, 80, 3], [9, 2], [44, 71, 23, 8, 60, 31], [12, 90, 55]]


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def environment(devices=None):
    """For a child that sees this many virtual devices of its own."""
    chosen = {} if devices is None else {"JAX_NUM_CPU_DEVICES": str(devices)}
    # Little is computed here and much compiled, on few cores.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "XLA_FLAGS": flags, **chosen}


def start(check, processes, devices, folder):
    """Starts processes that do `check`, one of the functions below; each writes what it finds to `folder`."""
    port = free_port()
    started = []
    for number in range(processes):
        command = [sys.executable, "-W", "error", __file__, check, str(port), str(processes), str(number), str(folder)]
        outputs = [Path(folder) / f"{check}-{number}.{stream}" for stream in ("out", "err")]
        with outputs[0].open("w") as out, outputs[1].open("w") as err:
            started.append(
                subprocess.Popen(command, env=environment(devices), stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            )
    return started


def finish(started, seconds=60.0):
    """Waits for all of them, and gives their exit codes; who is not done in time is ended and has none."""
    deadline = time.monotonic() + seconds
    codes = []
    for process in started:
        try:
            codes.append(process.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    return codes


def sharded_runs(number, folder):
    """Generates under two strategies, each over all hosts, and writes tokens and logits."""
    import equinox as eqx
    import jax.numpy as jnp
    import jax.random as jr

    import mistral_eqx as mx
    from mistral_eqx.parallel import gather_to_host

    found = {}
    for name, axes, strategy, kinds in (
        ("kv_replicated", "kv=8,rep=2", mx.KV_REPLICATED, ("greedy", "sampled")),
        ("batch", "dp=4,tp=4", mx.HEADS + "batch@dp", ("sampled",)),
    ):
        model = mx.load(folder / "model", mesh=mx.make_mesh(axes), strategy=strategy)
        here = sum(shard.data.size for shard in model.blocks[0].feed_forward.down_proj.weight.value.addressable_shards)
        found[f"{name}_share"] = np.array(here / model.blocks[0].feed_forward.down_proj.weight.value.size)
        ids = jnp.asarray([row[:2] for row in PROMPTS])
        found[f"{name}_logits"] = gather_to_host(eqx.filter_jit(model)(ids))
        for kind in kinds:
            out = mx.generate(model, PROMPTS, max_new_tokens=12, **samplings(mx, jr)[kind])
            found[f"{name}_{kind}"] = np.asarray(out.tokens)
            assert (np.asarray(out.lengths) == 12).all()
    np.savez(folder / f"found-{number}.npz", **found)


def samplings(mx, jr):
    return {"greedy": {}, "sampled": {"sampler": mx.Sampler(temperature=1.5, top_k=40, top_p=0.95), "key": jr.key(3)}}


def endless(number, folder):
    """Decodes without end, and says so after each text."""
    import mistral_eqx as mx

    axes = f"tp={len(mx.parallel.mesh.jax.devices())}"
    model = mx.load(folder / "model", mesh=mx.make_mesh(axes), strategy=mx.HEADS)
    while True:
        for _ in mx.stream(model, PROMPTS[:1], max_new_tokens=40):
            pass
        sys.stdout.write("decoded\n")


def training(number, folder):
    """Trains, is told to end in the middle by a signal to one host, and goes on; writes the loss of each step."""
    import jax
    from trainer_fixtures import At, Losses, host_batches, model, trainer

    seen = Losses()
    shard = jax.process_index(), jax.process_count()

    def end(run):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            # The notice travels by way of the other processes' service.
            time.sleep(2)

    ended = None
    try:
        run = trainer(folder / "run", seen, At(3, end), zero=2)
        run.fit(model("dp=2,tp=2", "hidden@tp batch@dp"), host_batches(shard), steps=100)
    except SystemExit as exit:
        ended = exit.code
    reached = len(seen.losses)
    trainer(folder / "run", seen, zero=2).fit(
        model("dp=2,tp=2", "hidden@tp batch@dp"), host_batches(shard), steps=reached + 3
    )
    found = {"ended": ended, "reached": reached, "losses": seen.losses}
    (folder / f"trained-{number}.json").write_text(json.dumps(found))


def failing(number, folder):
    """One process meets an error of its own while the others wait for it."""
    import mistral_eqx as mx

    if number == 1:
        raise ValueError("This host has no disk.")
    mx.parallel.agree("nothing", "")


def disagreeing(number, folder):
    """Tries what each process was told otherwise, and writes the sentences that refuse it."""
    import mistral_eqx as mx

    mesh = mx.make_mesh("tp=4")
    model = mx.load(folder / "model")
    wrong = {
        "strategy": lambda: mx.shard(model, mesh, mx.HEADS if number == 0 else mx.HEAD_DIM),
        "checkpoint": lambda: mx.load(folder / ("model", "other")[number], mesh=mesh, strategy=mx.HEADS),
    }
    wrong["again"] = lambda: mx.parallel.initialize("localhost:1", 1, 0)
    found = {}
    for name, call in wrong.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    (folder / f"refused-{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    from mistral_eqx.parallel import initialize

    check, port, processes, number, folder = sys.argv[1:]
    initialize(f"localhost:{port}", int(processes), int(number), timeout=40)
    globals()[check](int(number), Path(folder))
