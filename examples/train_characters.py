"""Differs from train_adder.py in the text, Moby-Dick by its characters, and in that the run can go on.

Evaluations, figures, and checkpoints from which the same command goes on, are in the run's folder.
"""

import dataclasses
import sys
from pathlib import Path

import jax.random as jr

import mistral_eqx as mx
from mistral_eqx.train import data


TEXT = Path(__file__).parent / "data" / "moby-dick.txt"


def main(folder="runs/characters", steps=300, rows=32, seq=128):
    text = TEXT.read_text(encoding="utf-8")
    known, held_out = data.Characters(text, seq), data.Characters(text, seq, held_out=True)

    def show(model):
        prompt = known.encode("Call me ")
        sampler = mx.Sampler(temperature=0.8, top_p=0.9)
        out = mx.generate(model, [prompt], max_new_tokens=100, sampler=sampler, key=jr.key(0))
        print(f"Call me {known.decode(out.tokens[0].tolist())}\n")

    config = dataclasses.replace(mx.PRESETS["gpt-micro"], vocab=known.vocab)
    model = mx.Mistral.init(config, key=jr.key(0))
    trainer = mx.Trainer(
        mx.train.adamw(mx.train.warmup_cosine(2e-3, warmup=min(50, steps // 2), steps=steps)),
        compute_dtype=None,
        remat="none",
        checkpoint_dir=folder,
        save_every=100,
        evaluate_on=data.batches(held_out, rows=rows, seq=seq, shuffle=False, epochs=1, remainder="pad"),
        evaluate_every=100,
        log_every=25,
        callbacks=[Print(), mx.train.Samples(show, every=100)],
    )
    trainer.fit(model, data.batches(known, rows=rows, seq=seq), steps=steps)


class Print(mx.train.Callback):
    def on_log(self, run, metrics):
        print(f"step {run.step}: loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} characters a second")

    def on_evaluation(self, run, metrics):
        print(f"held out: loss {metrics['loss']:.3f}, {metrics['accuracy']:.1%} of the characters\n")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
