"""Splits a model in a way of one's own: differs from tensor_parallel.py in that the strategy is written, not named.

Weights are split along both of their dimensions here, over a mesh of 2 x 2 devices (`embed` over one axis, everything
else over the other), which no named strategy does.
"""

import sys

import jax
import jax.numpy as jnp

import mistral_eqx as mx


def main(name="smollm2-135m"):
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), devices=jax.devices()[:4])
    strategy = mx.Strategy("embed@rows head_dim@columns hidden@columns vocab@columns")

    # A dimension that cannot be cut into equal parts is refused before anything is read.
    try:
        mx.load(name, mesh=mesh, strategy=mx.Strategy("q_per_kv@rows,columns"))
    except ValueError as error:
        print(f"Refused: {error}")

    model = mx.load(name, dtype="float32", mesh=mesh, strategy=strategy)
    for label, weight in (
        ("q_proj", model.blocks[0].attention.q_proj.weight.value),
        ("down_proj", model.blocks[0].feed_forward.down_proj.weight.value),
        ("embedding", model.embedding.weight.value),
    ):
        print(f"{label}: {weight.shape} in parts of {weight.addressable_shards[0].data.shape}")

    tokenizer = mx.load_tokenizer(name)
    ids = jnp.asarray([tokenizer.encode("The capital of France is")])
    out = mx.generate(model, ids, max_new_tokens=16)
    print(tokenizer.decode(out.tokens[0], after=ids[0]))

    # Any array can be split by such an expression, and then meets the model's in one program.
    x = mx.einshard(jnp.ones((4, 8, 6)), "batch@rows ... embed@columns", mesh)
    print(f"{x.shape} in parts of {x.addressable_shards[0].data.shape}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    main(*sys.argv[1:])
