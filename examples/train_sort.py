"""Trains a small model to sort digits, from nothing, in a minute or two on two cores; after minGPT's demo."""

import dataclasses
import sys

import jax.random as jr

import mistral_eqx as mx
from mistral_eqx.train import data


def main(steps=600, rows=64):
    known, held_out = data.Sort(length=6, symbols=3), data.Sort(length=6, symbols=3, held_out=True)
    batches = data.batches(known, rows=rows, seq=known.seq)

    config = dataclasses.replace(mx.PRESETS["gpt-nano"], vocab=known.vocab)
    model = mx.Mistral.init(config, key=jr.key(0))
    optimizer = mx.train.adamw(mx.train.warmup_cosine(4e-3, warmup=min(50, steps // 2), steps=steps))
    trainer = mx.Trainer(optimizer, compute_dtype=None, remat="none", log_every=100, callbacks=[Print()])
    model = trainer.fit(model, batches, steps=steps)

    out = mx.generate(model, held_out.prompts, max_new_tokens=held_out.length)
    right = (out.tokens == held_out.answers).all(axis=1)
    print(f"{right.sum()} of {len(right)} held-out sequences are sorted")
    for problem, answer in zip(held_out.prompts[:3], out.tokens, strict=False):
        print(f"{problem.tolist()} -> {answer.tolist()}")


class Print(mx.train.Callback):
    """Writes a line for each look at the figures."""

    def on_log(self, run, figures):
        print(f"step {run.step}: loss {figures['loss']:.4f}, {figures['accuracy']:.1%} of the digits")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
