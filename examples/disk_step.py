"""Trains with master weights and Adam's moments in files, and continues after the process has ended.

Memory holds the weights and the gradients in bfloat16, a quarter of what training in memory needs for its state.
"""

import dataclasses
import itertools
import sys
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr

import mistral_eqx as mx
from mistral_eqx.train import data


TEXT = Path(__file__).parent / "data" / "moby-dick.txt"


def main(steps=40, rows=8, seq=64):
    known = data.Characters(TEXT.read_text(encoding="utf-8"), seq)
    config = dataclasses.replace(mx.PRESETS["gpt-nano"], vocab=known.vocab)
    model = mx.Mistral.init(config, key=jr.key(0))
    optimizer = mx.train.adamw(mx.train.warmup_cosine(1e-2, warmup=steps // 8, steps=steps))
    batches = list(itertools.islice(data.batches(known, rows=rows, seq=seq), steps))

    in_memory = mx.train.TrainState.init(model, optimizer)
    gradients = megabytes(in_memory.model)
    print(f"in memory: {megabytes(in_memory) + gradients:.2f} MB of weights, gradients and moments")
    with tempfile.TemporaryDirectory() as folder:
        for stop in (steps // 2, steps):
            # Each time as a new process would: all that is left of the one before is the folder.
            step = mx.train.DiskStep(optimizer, folder)
            state = step.init(model, dtype="bfloat16")
            print(f"\nbegins after step {int(state.steps)}: {megabytes(state):.2f} MB of weights and gradients")
            for batch in batches[int(state.steps) : stop]:
                state, metrics = step(state, batch)
                if int(state.steps) % (steps // 4) == 0:
                    print(f"step {int(state.steps)}: loss {float(metrics.loss):.3f}")
        sizes = [file.stat().st_size for file in Path(folder).iterdir()]
        print(f"\n{len(sizes)} files with {sum(sizes) / 1e6:.2f} MB")


def megabytes(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_array))) / 1e6


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
