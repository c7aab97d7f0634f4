"""Differs from train_characters.py in the devices: eight virtual ones.

Weights, gradients and moments are split over four groups that share a batch (ZeRO 3), and each layer's heads over the
two devices of a group. The run is ended in the middle, and goes on on another mesh.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr

import mistral_eqx as mx
from mistral_eqx.train import data


TEXT = Path(__file__).parent / "data" / "moby-dick.txt"


def main(steps=100, rows=16, seq=64):
    text = TEXT.read_text(encoding="utf-8")
    known = data.Characters(text, seq)
    config = dataclasses.replace(mx.PRESETS["gpt-micro"], vocab=64 * (-(-known.vocab // 64)))
    optimizer = mx.train.adamw(mx.train.wsd(2e-3, warmup=steps // 10, decay=steps // 5, steps=steps))
    batches = data.batches(known, rows=rows, seq=seq)

    def run(folder, axes, zero, callbacks=()):
        model = mx.Mistral.init(config, key=jr.key(0))
        model = mx.shard(model, mx.make_mesh(axes), mx.HEADS + "batch@dp")
        told = [Print(axes, zero), *callbacks]
        trainer = mx.Trainer(optimizer, zero=zero, checkpoint_dir=folder, log_every=steps // 5, callbacks=told)
        return trainer.fit(model, batches, steps=steps)

    with tempfile.TemporaryDirectory() as folder:
        run(folder, "dp=4,tp=2", 3, [StopAt(steps // 2)])
        model = run(folder, "dp=2,tp=4", 1)
    prompts = [known.encode(start) for start in ("Call me ", "The whale ")]
    out = mx.generate(model, prompts, max_new_tokens=40)
    for tokens in out.tokens:
        print(repr(known.decode(tokens.tolist())))


@dataclasses.dataclass
class Print(mx.train.Callback):
    axes: str
    zero: int

    def on_start(self, run):
        arrays = jax.tree.leaves(eqx.filter(run.state, eqx.is_array))
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in arrays)
        print(f"{self.axes}, ZeRO {self.zero}, from step {run.step}: {held / 1e6:.2f} MB of state a device")

    def on_log(self, run, metrics):
        print(f"step {run.step}: loss {metrics['loss']:.3f}")


@dataclasses.dataclass
class StopAt(mx.train.Callback):
    step: int

    def on_step(self, run, metrics):
        run.stop = run.step == self.step


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(*map(int, sys.argv[1:]))
