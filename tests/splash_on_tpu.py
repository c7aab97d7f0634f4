"""Compiles attention for TPUs that are not here, in a process of its own, and prints the programs as JSON."""

import json
import os

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import mistral_eqx as mx
from mistral_eqx.config import MistralConfig
from mistral_eqx.nn import flash_attention
from mistral_eqx.planning.programs import Job, programs


SEQ = 2048


def gradient(dtype, device):
    """All gradients of causal attention over `SEQ` tokens."""
    here = SingleDeviceSharding(device)
    shape = lambda *sizes, dtype=dtype: jax.ShapeDtypeStruct(sizes, dtype, sharding=here)  # noqa: E731
    q, k = shape(2, 2, 3, SEQ, 64), shape(2, 2, SEQ, 64)

    def loss(q, k, v, positions):
        context, _ = flash_attention(q, k, v, jnp.zeros_like(positions), positions, positions, scale=0.125)
        return jnp.sum(jnp.sin(context))

    positions = shape(2, SEQ, dtype=jnp.int32)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, positions).compile().as_text()


def prompt(devices):
    """A piece of a prompt of `2 * SEQ` tokens, read into the cache of a model on a mesh."""
    config = MistralConfig(
        vocab=256,
        embed=256,
        hidden=512,
        layers=1,
        kv_heads=4,
        q_per_kv=2,
        head_dim=64,
        rope_theta=1e4,
        norm_eps=1e-5,
        max_positions=2 * SEQ,
        windows=(None,),
    )
    job = Job(config, "v5e:2x2", 4, mx.HEADS.layout, {"tp": 4}, 2, 2 * SEQ, 2 * SEQ, "bfloat16")
    return next(programs(job, devices)).lower("tpu").compile().as_text()


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    texts = {dtype: gradient(dtype, devices[0]) for dtype in ("bfloat16", "float16")}
    texts["heads"] = prompt(devices)
    json.dump(texts, answer)
    answer.close()
