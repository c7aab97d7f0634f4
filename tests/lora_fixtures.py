"""Models with adapters that change something, and a weight that only dequantises."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Int8
from model_fixtures import SMALL, small_model

import mistral_eqx as mx
from mistral_eqx.lora import LoRAWeight
from mistral_eqx.nn import AbstractWeight, DenseWeight, Linear


CONFIG = dataclasses.replace(SMALL, vocab=64, layers=4, windows=(None,) * 4, q_per_kv=2)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Int8Weight(AbstractWeight):
    """Whole numbers and a factor: nothing can be added to them."""

    value: Int8[Array, "..."]
    factor: Float[Array, ""]

    @classmethod
    def of(cls, weight):
        factor = jnp.abs(weight.value).max() / 127
        return cls(jnp.round(weight.value / factor).astype(jnp.int8), factor)

    def dense(self) -> Float[Array, "..."]:
        return self.value.astype(self.factor.dtype) * self.factor

    def contract(self, x: Float[Array, "batch seq *in"], in_dims: str, out_dims: str) -> Float[Array, "batch seq *out"]:
        return DenseWeight(self.dense()).contract(x, in_dims, out_dims)

    def rows(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq ..."]:
        return self.dense()[ids]

    @property
    def row_count(self) -> int:
        return self.value.shape[0]

    def dims(self, in_dims: str, out_dims: str) -> dict[str, str]:
        return {"value": f"{out_dims} {in_dims}", "factor": ""}


def quantized(model):
    """Its linear layers in int8."""

    def of(node):
        return dataclasses.replace(node, weight=Int8Weight.of(node.weight)) if isinstance(node, Linear) else node

    return jax.tree.map(of, model, is_leaf=lambda node: isinstance(node, Linear))


def adapted(model=None, *, targets=LINEAR, rank=3, **options):
    """Adapters whose `B` is not zero."""
    model = small_model(config=CONFIG) if model is None else model
    model = mx.apply_lora(model, rank=rank, alpha=5.0, targets=targets, key=jr.key(1), **options)
    draw = np.random.default_rng(2)

    def drawn(node):
        if not isinstance(node, LoRAWeight):
            return node
        value = jnp.asarray(0.1 * draw.standard_normal(node.b.value.shape), node.b.value.dtype)
        return dataclasses.replace(node, b=DenseWeight(value))

    return jax.tree.map(drawn, model, is_leaf=lambda node: isinstance(node, LoRAWeight))


def adapters(model):
    """All `A` and `B`."""
    nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, LoRAWeight))
    return [part.value for node in nodes if isinstance(node, LoRAWeight) for part in (node.a, node.b)]


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))
