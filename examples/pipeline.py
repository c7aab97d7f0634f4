"""Differs from pretrain_sharded.py in what is split: the blocks, into stages through which micro-batches pass.

Eight virtual devices: two groups take different rows, and the four devices of a group have one block each. The example
trains in both schedules, and compares the losses with those of one device. Then it generates in stages: the rows of a
group of devices are in four groups, so that each stage always has one.
"""

import dataclasses
import sys
import time
from pathlib import Path

import jax
import jax.random as jr
import numpy as np

import mistral_eqx as mx
from mistral_eqx.train import data


TEXT = Path(__file__).parent / "data" / "moby-dick.txt"
AXES = {"dp": 2, "pp": 4}
STRATEGY = mx.Strategy("layers@pp batch@dp")


def main(steps=5, micro_batches=8, seq=64):
    text, stages, rows = TEXT.read_text(encoding="utf-8"), AXES["pp"], micro_batches * AXES["dp"]
    known = data.Characters(text, seq)
    config = dataclasses.replace(
        mx.PRESETS["gpt-nano"], vocab=known.vocab, max_positions=seq, layers=stages, windows=(None,) * stages
    )
    ids = known.encode(text[: steps * rows * (seq + 1)])
    examples = [mx.train.causal(ids[start : start + seq + 1]) for start in range(0, len(ids), seq + 1)]
    optimizer, losses = mx.train.adamw(1e-2), {}
    for name in ("one device", "gpipe", "1f1b"):
        model, options = mx.Mistral.init(config, key=jr.key(0)), {}
        if name != "one device":
            model = mx.shard(mx.nn.stack(model), mx.make_mesh(AXES), STRATEGY)
            options = {"schedule": name, "accumulate": micro_batches}
        state = mx.train.TrainState.init(model, optimizer, zero=0 if name == "one device" else 1)
        step = mx.train.make_step(optimizer, compute_dtype=None, **options)
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
    for name, idle in (("gpipe", stages - 1), ("1f1b", 2 * (stages - 1))):
        ticks = micro_batches + idle
        print(f"{name:10} {ticks} ticks, in {idle} of which a stage waits: {idle / ticks:.0%}")
    prompts = [examples[row].inputs[: seq // 2] for row in range(rows)]
    found, expected = (
        mx.generate(model, prompts, max_new_tokens=seq // 4)
        for model in (mx.nn.in_stages(state.model), state.unstacked())
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    print(f"Generated in stages: {known.decode(found.tokens[0].tolist())!r}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(*map(int, sys.argv[1:]))
