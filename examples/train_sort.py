"""Trains a small model to sort digits, from nothing, in a minute or two on two cores; after minGPT's demo."""

import dataclasses
import sys

import jax.random as jr
import numpy as np

import mistral_eqx as mx


LENGTH, DIGITS = 6, 10


def problem(digits):
    """Digits, then the same ones sorted; only the sorted ones are to be told."""
    return mx.train.causal(np.concatenate([digits, np.sort(digits)]), [0] * LENGTH + [1] * LENGTH)


def main(steps=2000, rows=64):
    # Every sequence that is; a thousand of them are never trained on.
    every = np.stack(np.unravel_index(np.arange(DIGITS**LENGTH), (DIGITS,) * LENGTH), axis=1).astype(np.int32)
    random = np.random.default_rng(0)
    held_out, known = np.split(random.permutation(every), [1000])

    config = dataclasses.replace(mx.PRESETS["gpt-nano"], vocab=DIGITS)
    model = mx.Mistral.init(config, key=jr.key(0))
    optimizer = mx.train.adamw(mx.train.warmup_cosine(2e-3, warmup=50, steps=steps))
    state = mx.train.TrainState.init(model, optimizer)
    step = mx.train.make_step(optimizer, compute_dtype=None, remat="none")
    for number in range(steps):
        batch = mx.train.one_a_row(
            [problem(digits) for digits in known[random.integers(0, len(known), rows)]], 2 * LENGTH - 1
        )
        state, metrics = step(state, batch)
        if number % 100 == 0 or number == steps - 1:
            print(f"step {number}: loss {metrics.loss:.4f}, {metrics.accuracy:.1%} of the digits")

    out = mx.generate(state.unstacked(), held_out, max_new_tokens=LENGTH)
    right = (np.asarray(out.tokens) == np.sort(held_out)).all(axis=1)
    print(f"{right.sum()} of {len(right)} held-out sequences are sorted")
    print(f"{held_out[0].tolist()} -> {out.tokens[0].tolist()}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
