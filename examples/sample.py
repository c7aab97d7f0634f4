"""Draws several continuations: differs from generate.py in the sampler, and in one key for each row of the batch."""

import sys

import jax.numpy as jnp
import jax.random as jr

import mistral_eqx as mx


def main(name="smollm2-135m"):
    model, tokenizer = mx.from_pretrained(name)
    prompt = tokenizer.encode("Once upon a time")
    seeds = [0, 1, 2]
    keys = jnp.stack([jr.key(seed) for seed in seeds])
    for options in ({"temperature": 0.7}, {"top_p": 0.9}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}):
        out = mx.generate(
            model,
            [prompt] * len(seeds),
            max_new_tokens=24,
            sampler=mx.Sampler(**options),
            key=keys,
        )
        print(options)
        for seed, tokens, length in zip(seeds, out.tokens, out.lengths, strict=True):
            print(f"  seed {seed}: {tokenizer.decode(tokens[:length], after=prompt)!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
