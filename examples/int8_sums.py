"""Sums that travel between devices as int8 codes: about a quarter of the bytes, and predictions that change a little.

Without accelerators the devices are virtual, parts of this computer's CPU, so nothing becomes faster here. Three of
them, since the default model has three key/value heads.
"""

import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp

import mistral_eqx as mx
from mistral_eqx.planning import forward_pass


TEXT = Path(__file__).parent / "data" / "moby-dick.txt"


def main(name="smollm2-135m", devices=3, seq=192):
    tokenizer = mx.load_tokenizer(name)
    ids = jnp.asarray([tokenizer.encode(TEXT.read_text(encoding="utf-8")[: 16 * seq])[:seq]], jnp.int32)
    mesh, expected = mx.make_mesh({"tp": devices}), None
    for word in ("", "exchange=int8"):
        strategy = mx.HEADS + word
        model = mx.load(name, dtype="float32", mesh=mesh, strategy=strategy)
        logits = jax.device_get(eqx.filter_jit(model)(ids))
        found = jax.nn.log_softmax(logits[0])
        expected = found if expected is None else expected
        kl = jnp.mean(jnp.sum(jnp.exp(expected) * (expected - found), axis=-1))
        same = jnp.mean(jnp.argmax(found, axis=-1) == jnp.argmax(expected, axis=-1))
        print(f"{strategy.layout}\n  a device sends {sent(model.config, strategy, devices, seq) / 1e3:.1f} kB")
        print(f"  KL divergence {kl:.4f} nats a token, {same:.1%} of the most probable tokens are the same")
        print(f"  the text goes on with {tokenizer.decode([int(jnp.argmax(found[-1]))])!r}")


def sent(config, strategy, devices, seq):
    """The bytes that a device sends along a ring."""
    others = (devices - 1) / devices
    shares = {"all_reduce": 2 * others, "all_to_all": others, "all_gather": devices - 1}
    found = forward_pass(config, strategy, {"tp": devices}, batch=1, seq=seq, dtype="float32")
    return sum(one.count * one.bytes * shares[one.kind] for one in found)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
