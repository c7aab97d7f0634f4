"""Splits a mixture of experts over eight devices in several ways, and computes the same on all of them as on one.

The model has random weights and the layers of Mixtral in small: eight experts, of which two compute each token. Without
accelerators the devices are virtual, parts of this computer's CPU.
"""

import collections
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import mistral_eqx as mx


STRATEGIES = [
    ("each device has one expert", "ep=8", "experts@ep"),
    ("each device has a part of every expert", "tp=8", "kv_heads@tp hidden@tp vocab@tp"),
    ("both", "ep=4,tp=2", "experts@ep kv_heads@tp hidden@tp vocab@tp"),
    ("experts and rows", "dp=2,ep=4", "batch@dp experts@ep kv_heads@ep vocab@ep"),
    ("experts and rows over the same devices", "dp=2,tp=4", "batch@dp experts@dp kv_heads@tp hidden@tp vocab@tp"),
]


def main(new_tokens=16):
    routing = mx.Routing(experts=8, per_token=2)
    config = mx.MistralConfig(
        vocab=256,
        embed=64,
        hidden=128,
        layers=2,
        kv_heads=8,
        q_per_kv=1,
        head_dim=8,
        rope_theta=1e6,
        norm_eps=1e-5,
        max_positions=256,
        windows=(None, None),
        routing=routing,
    )
    model = mx.Mistral.init(config, key=jr.key(0))
    ids = jr.randint(jr.key(1), (2, 24), 0, config.vocab)

    layer = model.blocks[0].feed_forward
    chosen, shares = layer.router(model.embedding(ids))
    counts = collections.Counter(np.asarray(chosen).reshape(-1).tolist())
    print("tokens of each expert of the first layer:", [counts[expert] for expert in range(routing.experts)])
    print("the first token:", *(f"expert {e} {share:.0%}" for e, share in zip(chosen[0, 0], shares[0, 0], strict=True)))

    logits = eqx.filter_jit(model)(ids)
    expected = mx.generate(model, ids, max_new_tokens=int(new_tokens)).tokens
    for what, mesh, layout in STRATEGIES:
        split = mx.shard(model, mx.make_mesh(mesh), mx.Strategy(layout))
        error = jnp.max(jnp.abs(jax.device_get(eqx.filter_jit(split)(ids)) - logits)) / jnp.max(jnp.abs(logits))
        found = mx.generate(split, ids, max_new_tokens=int(new_tokens)).tokens
        held = split.blocks[0].feed_forward.up_proj.weight.value.addressable_shards[0].data.shape
        print(f"{what} ({mesh}): {held} of {layer.up_proj.weight.value.shape} on a device, logits off by {error:.0e}")
        assert (found == expected).all()


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(*sys.argv[1:])
