"""Adapters of experts: the sum of weights, on any strategy, trained, and in PEFT's files."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from fixtures.generation import refused
from fixtures.model import FLOAT32_TOLERANCE, SMALL, relative_error, small_model
from safetensors.numpy import load_file, save_file

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.lora import LoRAWeight


CONFIG = dataclasses.replace(
    SMALL, vocab=64, layers=1, windows=(None,), kv_heads=2, q_per_kv=1, routing=mx.Routing(experts=4, per_token=2)
)
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab, (4, 9)).astype(np.int32)
TARGETS = ("q_proj", "gate_proj", "up_proj", "down_proj")
run = eqx.filter_jit(lambda model, ids: model(ids))


def adapted(**options):
    """Adapters that change the results: `B` is not zero."""
    model = mx.apply_lora(small_model(config=CONFIG), rank=3, alpha=6.0, targets=TARGETS, key=jr.key(0), **options)
    draw = np.random.default_rng(1).standard_normal

    def drawn(node):
        if not isinstance(node, LoRAWeight):
            return node
        return eqx.tree_at(
            lambda node: node.b.value, node, jnp.asarray(0.3 * draw(node.b.value.shape), node.b.value.dtype)
        )

    return jax.tree.map(drawn, model, is_leaf=lambda node: isinstance(node, LoRAWeight))


def test_merged_weights_give_the_same_logits():
    model = adapted()
    weight = model.blocks[0].feed_forward.down_proj.weight
    assert (weight.a.value.shape, weight.b.value.shape) == ((4, 3, 40), (4, 24, 3))
    merged = mx.merge_lora(model)
    expected = np.asarray(weight.base.value) + 2.0 * np.einsum("eor,eri->eoi", weight.b.value, weight.a.value)
    assert relative_error(merged.blocks[0].feed_forward.down_proj.weight.value, expected) < 1e-6
    found, plain = run(model, IDS), run(small_model(config=CONFIG), IDS)
    assert relative_error(found, run(merged, IDS)) < FLOAT32_TOLERANCE
    assert relative_error(found, plain) > 0.01


@pytest.mark.slow
def test_only_the_adapters_are_trained_and_alike_on_several_devices():
    model, step = adapted(), train.make_step(optax.sgd(0.1), compute_dtype=None, balance_loss=0.1)
    batch = train.one_a_row([train.causal(row) for row in IDS], 8)
    layout, axes = "batch@dp experts@dp kv_heads@tp hidden@tp vocab@tp", {"dp": 2, "tp": 2}
    split = mx.shard(model, mx.make_mesh(axes), mx.Strategy(layout))
    results = []
    for one in (model, split):
        state, metrics = step(train.TrainState.init(one, optax.sgd(0.1)), batch)
        results.append((float(metrics.loss), state.unstacked().blocks[0].feed_forward.up_proj.weight))
    (loss, weight), (other_loss, other) = results
    # Float32: sums of some hundred terms, in another order.
    assert abs(loss - other_loss) < 1e-5 * loss
    before = model.blocks[0].feed_forward.up_proj.weight
    np.testing.assert_array_equal(weight.base.value, before.base.value)
    for factor in ("a", "b"):
        found, expected = (np.asarray(getattr(one, factor).value) for one in (other, weight))
        assert relative_error(found, expected) < FLOAT32_TOLERANCE
        assert relative_error(expected, getattr(before, factor).value) > 1e-3


def test_a_peft_folder_has_the_adapters_of_each_expert(tmp_path):
    model = adapted()
    mx.save_lora(model, tmp_path / "adapters")
    names = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts"
    assert names[f"{stem}.2.w2.lora_B.weight"].shape == (24, 3)
    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["q_proj", "w1", "w2", "w3"]
    loaded = mx.load_lora(small_model(config=CONFIG), tmp_path / "adapters")
    for one, other in zip(*(jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (loaded, model)), strict=True):
        np.testing.assert_array_equal(one, other)
    del names[f"{stem}.2.w2.lora_B.weight"]
    save_file(names, tmp_path / "adapters" / "adapter_model.safetensors")
    with refused("lacks the tensor", "experts.2.w2.lora_B.weight"):
        mx.load_lora(small_model(config=CONFIG), tmp_path / "adapters")


def test_adapters_of_experts_have_no_dropout():
    with refused("adapters of the experts in blocks.0.feed_forward.gate_proj cannot have dropout; set dropout to 0"):
        adapted(dropout=0.1)
