"""Differs from train_sort.py in the problem: two numbers of two digits, and their sum, the smallest digit first."""

import dataclasses
import sys

import jax.random as jr

import mistral_eqx as mx
from mistral_eqx.train import data


def main(steps=3000, rows=128):
    known, held_out = data.Adder(digits=2), data.Adder(digits=2, held_out=True)
    batches = data.batches(known, rows=rows, seq=known.seq)

    config = dataclasses.replace(mx.PRESETS["gpt-nano"], vocab=known.vocab)
    model = mx.Mistral.init(config, key=jr.key(0))
    optimizer = mx.train.adamw(mx.train.warmup_cosine(4e-3, warmup=min(50, steps // 2), steps=steps))
    trainer = mx.Trainer(optimizer, compute_dtype=None, remat="none", log_every=250, callbacks=[Print()])
    model = trainer.fit(model, batches, steps=steps)

    out = mx.generate(model, held_out.prompts, max_new_tokens=held_out.digits + 1)
    right = (out.tokens == held_out.answers).all(axis=1)
    print(f"{right.sum()} of {len(right)} held-out sums are right")
    for prompt, answer in zip(held_out.prompts[:5], out.tokens, strict=False):
        first, second = ("".join(map(str, part)) for part in (prompt[:2], prompt[2:]))
        print(f"{first} + {second} = {''.join(map(str, answer.tolist()[::-1]))}")


class Print(mx.train.Callback):
    def on_log(self, run, metrics):
        print(f"step {run.step}: loss {metrics['loss']:.4f}, {metrics['accuracy']:.1%} of the digits")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
