"""Splits a model over devices in every named way that fits, and says the same on all of them as on one.

Without accelerators the devices are virtual, parts of this computer's CPU, which shows that it is right and not that it
is fast. Three of them, since the default model has three key/value heads.
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp

import mistral_eqx as mx


def main(name="smollm2-135m", devices=3):
    tokenizer = mx.load_tokenizer(name)
    ids = jnp.asarray([tokenizer.encode("The capital of France is")])

    model = mx.load(name, dtype="float32")
    logits = eqx.filter_jit(model)(ids)
    expected = mx.generate(model, ids, max_new_tokens=16).tokens[0].tolist()
    print(f"{'one device':30} {tokenizer.decode(expected, after=ids[0])!r}")

    for choice in mx.strategies(model.config, int(devices)):
        if "batch" in choice.name:
            continue  # for several prompts
        mesh = choice.mesh()
        # Straight from the file: no device and no process ever has the whole model.
        parts = mx.load(name, dtype="float32", mesh=mesh, strategy=choice.strategy)
        error = jnp.max(jnp.abs(jax.device_get(eqx.filter_jit(parts)(ids)) - logits)) / jnp.max(jnp.abs(logits))
        found = mx.generate(parts, ids, max_new_tokens=16).tokens[0].tolist()
        axes = ",".join(f"{axis}={size}" for axis, size in choice.axes.items())
        print(f"{choice.name + ' ' + axes:30} {tokenizer.decode(found, after=ids[0])!r}, logits off by {error:.0e}")
        assert found == expected


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(*sys.argv[1:])
