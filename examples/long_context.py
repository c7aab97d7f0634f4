"""Differs from pretrain_sharded.py in what is split: the tokens of long rows.

Eight virtual devices: two groups take different rows, and the four devices of a group share the tokens of each row, in
attention too. Keys and values travel along a ring, or each device gathers them; the losses are those of one device.
"""

import dataclasses
import sys
import time
from pathlib import Path

import jax
import jax.random as jr
import numpy as np

import mistral_eqx as mx
from mistral_eqx.planning import forward_pass
from mistral_eqx.train import data


TEXT = Path(__file__).parent / "data" / "moby-dick.txt"
AXES = {"dp": 2, "cp": 4}
STRATEGIES = {
    "one device": mx.SINGLE,
    "ring": mx.Strategy("batch@dp seq@cp kv_seq@cp"),
    "gather": mx.Strategy("batch@dp seq@cp"),
}


def main(steps=5, rows=2, seq=1024):
    text = TEXT.read_text(encoding="utf-8")
    known = data.Characters(text, seq)
    config = dataclasses.replace(mx.PRESETS["gpt-nano"], vocab=64 * (-(-known.vocab // 64)), max_positions=seq)
    ids = known.encode(text[: steps * rows * (seq + 1)])
    examples = [mx.train.causal(ids[start : start + seq + 1]) for start in range(0, len(ids), seq + 1)]
    optimizer = mx.train.adamw(1e-2)
    losses = {}
    for name, strategy in STRATEGIES.items():
        model = mx.Mistral.init(config, key=jr.key(0))
        if strategy != mx.SINGLE:
            model = mx.shard(model, mx.make_mesh(AXES), strategy)
        state = mx.train.TrainState.init(model, optimizer, zero=0 if strategy == mx.SINGLE else 3)
        step = mx.train.make_step(optimizer, compute_dtype=None)
        start, losses[name] = time.perf_counter(), []
        for number in range(steps):
            batch = mx.train.one_a_row(examples[number * rows :][:rows], seq)
            state, metrics = step(state, batch)
            losses[name].append(float(metrics.loss))
        seconds = time.perf_counter() - start
        print(
            f"{name:10} losses {', '.join(f'{loss:.4f}' for loss in losses[name])} in {seconds:.0f} s, with compiling"
        )
        np.testing.assert_allclose(losses[name], losses["one device"], rtol=1e-4)
        if strategy == mx.SINGLE:
            continue
        for one in forward_pass(config, strategy, AXES, batch=rows, seq=seq, dtype="float32"):
            print(f"{'':10} {one.count} x {one.kind} of {one.bytes / 1e3:.0f} kB: {one.what}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(*map(int, sys.argv[1:]))
