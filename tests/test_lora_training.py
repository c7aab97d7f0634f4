"""Of a model with adapters these alone are trained, and the steps on a mesh are those of one device."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import refused
from fixtures.lora import CONFIG, LINEAR, Int8Weight, adapted, adapters, arrays, quantized
from fixtures.model import relative_error, small_model

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.lora import LoRAWeight
from mistral_eqx.nn import stack


OPTIMIZER = train.adamw(1e-2)
STEP = train.make_step(OPTIMIZER, compute_dtype=None)
BFLOAT16_STEP = train.make_step(OPTIMIZER)
ROWS, SEQ = 8, 12
TARGETS = ("q_proj", "o_proj", "down_proj")


def batch(seed=0):
    draw = np.random.default_rng(seed)
    return train.one_a_row([train.causal(draw.integers(0, CONFIG.vocab, SEQ)) for _ in range(ROWS)], SEQ)


def trained(model, steps=3, *, step=STEP, dtype=jnp.float32, zero=0):
    state = train.TrainState.init(model, OPTIMIZER, dtype=dtype, zero=zero)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    return losses, state


def frozen(model):
    """All arrays but the adapters'."""
    own = {id(leaf) for leaf in adapters(model)}
    return [leaf for leaf in arrays(model) if id(leaf) not in own]


def same(one, other):
    return all(a.dtype == b.dtype and (np.asarray(a) == np.asarray(b)).all() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("scheme", [mx.NF4(8), mx.Int8(activations="int8")])
def test_weights_in_blocks_are_not_trained(scheme):
    """Otherwise their floats alone would be, the norms and the embedding."""
    model = mx.quantize(small_model(config=CONFIG), {"*.v_proj": scheme})
    trainer = mx.Trainer(OPTIMIZER, progress=False)
    with refused("weights in", "blocks", "mx.load(path, dtype='float32')", "mx.apply_lora"):
        trainer.fit(model, [batch()])
    train.TrainState.init(mx.apply_lora(model, rank=2, alpha=4.0, key=jr.key(0)), OPTIMIZER)


@pytest.mark.parametrize("kind", [pytest.param("float32", marks=pytest.mark.long), "bfloat16", "int8"])
@pytest.mark.slow
def test_adapters_alone_are_trained(kind):
    model = small_model(config=CONFIG, dtype=jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    model = adapted(quantized(model) if kind == "int8" else model, targets=TARGETS)
    losses, state = trained(model, 4, step=BFLOAT16_STEP if kind == "bfloat16" else STEP)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    after = state.unstacked()
    assert same(frozen(after), frozen(model))
    assert all((a != b).any() for a, b in zip(adapters(after), adapters(model), strict=True))
    assert {leaf.dtype for leaf in adapters(after)} == {jnp.dtype(jnp.float32)}
    # Two moments of 4 bytes each, and a count.
    numbers = sum(leaf.size for leaf in adapters(model))
    assert sum(leaf.nbytes for leaf in arrays(state.optimizer_state)) == 8 * numbers + 4
    kept = sum(leaf.nbytes for leaf in arrays(state.model))
    assert kept == sum(leaf.nbytes for leaf in arrays(model))


def model64(base=lambda model: model):
    model = base(small_model(config=CONFIG, dtype=jnp.float64))
    return adapted(model, targets=LINEAR, rank=2, dtype=jnp.float64)


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        losses, state = trained(model64(), dtype=jnp.float64)
        return losses, adapters(state.unstacked())


@pytest.mark.parametrize(
    ("axes", "strategy", "zero"),
    [
        pytest.param({"dp": 2}, mx.Strategy("batch@dp"), 3, marks=pytest.mark.long),
        ({"dp": 2, "kv": 2, "rep": 2}, mx.HEADS_X_HEAD_DIM + "batch@dp", 2),
    ],
    ids=["ZeRO 3", "HEADS_X_HEAD_DIM, ZeRO 2"],
)
@pytest.mark.slow
def test_the_steps_are_those_of_one_device(expected, axes, strategy, zero):
    with jax.enable_x64(True):
        model = mx.shard(model64(), mx.make_mesh(axes), strategy)
        losses, state = trained(model, dtype=jnp.float64, zero=zero)
        after = state.unstacked()
        # In float64: thousands of operations, each of them off by 1e-16.
        np.testing.assert_allclose(losses, expected[0], rtol=1e-10)
        for one, other in zip(adapters(after), expected[1], strict=True):
            assert relative_error(one, other) < 1e-10
        assert same(frozen(after), frozen(model))


@pytest.mark.slow
def test_zero_3_splits_what_is_not_trained_too():
    model = mx.shard(adapted(quantized(small_model(config=CONFIG))), mx.make_mesh({"dp": 2}), mx.Strategy("batch@dp"))
    losses, state = trained(model, 2, zero=3)
    assert losses[1] < losses[0]
    up = state.model.pattern[0].feed_forward.up_proj.weight.base
    assert type(up) is Int8Weight
    assert up.value.addressable_shards[0].data.size * 2 == up.value.size
    after = state.unstacked()
    assert same(frozen(after), frozen(model))


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.long), jnp.bfloat16])
@pytest.mark.slow
def test_the_table_too_on_request(dtype):
    model = small_model(config=dataclasses.replace(CONFIG, tied=True), dtype=dtype)
    model = mx.apply_lora(model, rank=2, alpha=4.0, train_embeddings=True, key=jr.key(0))
    losses, state = trained(model, step=BFLOAT16_STEP)
    assert losses[-1] < losses[0]
    after = state.unstacked()
    assert (after.embedding.weight.value != model.embedding.weight.value).any()
    numbers = sum(leaf.size for leaf in adapters(model)) + model.embedding.weight.value.size
    assert sum(leaf.nbytes for leaf in arrays(state.optimizer_state)) == 8 * numbers + 4
    assert same([after.norm.weight], [model.norm.weight])


def test_adapters_are_decayed_as_matrices():
    stacked = stack(adapted(targets=("q_proj",)))
    weights = eqx.filter(stacked, train.trained(stacked))
    assert sum(jax.tree.leaves(train.decayed(weights))) == 2
    nodes = jax.tree.leaves(stacked, is_leaf=lambda node: isinstance(node, LoRAWeight))
    assert sum(isinstance(node, LoRAWeight) for node in nodes) == 1


@pytest.mark.slow
def test_the_figures_of_the_page():
    """What is trained of SmolLM2, 16 bytes a number: weight, gradient and two moments. Nothing is allocated."""

    def state(tuned):
        model = mx.Mistral.init(mx.PRESETS["smollm2-135m"], key=jr.key(0))
        if tuned:
            model = mx.apply_lora(model, rank=8, alpha=16.0, targets=("q_proj", "v_proj"), key=jr.key(0))
        return train.TrainState.init(model, OPTIMIZER)

    page = (Path(__file__).parents[1] / "docs/lora.md").read_text()
    for tuned, numbers, figures in ((True, 460_800, "7.4 MB"), (False, 134_515_008, "2.2 GB")):
        shape = eqx.filter_eval_shape(state, tuned)
        kept = jax.tree.leaves(eqx.filter(shape.model, train.trained(shape.model)))
        assert sum(leaf.size for leaf in kept) == numbers
        floats = [leaf for leaf in jax.tree.leaves(shape.optimizer_state) if leaf.ndim]
        taken = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
        taken += sum(leaf.size * leaf.dtype.itemsize for leaf in floats)
        assert taken == 16 * numbers
        assert figures in {f"{taken / 1e6:.1f} MB", f"{taken / 1e9:.1f} GB"}
        assert figures in page
