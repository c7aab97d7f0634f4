"""Multiplies while tokens travel: the word `overlap` of a strategy, in one direction and in both.

On virtual devices it shows that the results are those of one device, and which exchanges become others. What it saves
on a chip is an estimate in closed form.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import mistral_eqx as mx
from mistral_eqx.planning import CHIPS, exposed, forward_pass


WORDS = ("", "overlap=1", "overlap")
AXES = {"tp": 4}


def main(rows=2, seq=64, chip="v5e"):
    config = mx.PRESETS["gpt-micro"]
    model = mx.Mistral.init(config, key=jr.key(0))
    ids = jr.randint(jr.key(1), (rows, seq), 0, config.vocab)
    expected = eqx.filter_jit(model)(ids)
    for word in WORDS:
        strategy = mx.SEQUENCE_PARALLEL + word
        logits = eqx.filter_jit(mx.shard(model, mx.make_mesh(AXES), strategy))(ids)
        error = float(jnp.max(jnp.abs(jax.device_get(logits) - expected)) / jnp.max(jnp.abs(expected)))
        print(f"{strategy.name:28} logits off by {error:.0e}")
        assert error < 1e-5
        for one in forward_pass(config, strategy, AXES, batch=rows, seq=seq, dtype="float32"):
            print(f"{'':28} {one.count} x {one.kind} of {one.bytes / 1e3:.0f} kB: {one.what}")
    print(f"\nMistral 7B on 8 {chip}, a layer of a prefill of 4096 tokens, in microseconds:")
    for word in WORDS:
        strategy = mx.SEQUENCE_PARALLEL + word
        found = exposed(mx.PRESETS["7b-v0.2"], strategy, {"tp": 8}, CHIPS[chip], batch=1, seq=4096)
        waits = ", ".join(f"{one.what} {1e6 * one.wait:.0f}" for one in found)
        print(f"{strategy.name:28} products {1e6 * sum(one.product for one in found):.0f}, waits: {waits}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(*map(int, sys.argv[1:3]), *sys.argv[3:4])
