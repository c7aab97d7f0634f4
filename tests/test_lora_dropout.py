"""Dropout before adapters: in training steps alone, and the same on every mesh."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.generation import refused
from fixtures.lora import CONFIG, LINEAR, Int8Weight, adapted, adapters, quantized
from fixtures.model import relative_error, small_model

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.lora import LoRAWeight
from mistral_eqx.nn import DenseWeight, stack
from mistral_eqx.train.dropout import with_dropout


OPTIMIZER = train.adamw(1e-2)
ROWS, SEQ = 8, 12
DROPOUT = 0.3


def batch(rows=ROWS):
    draw = np.random.default_rng(0)
    return train.one_a_row([train.causal(draw.integers(0, CONFIG.vocab, SEQ)) for _ in range(rows)], SEQ)


def keys_of(tree):
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, LoRAWeight))
    return [node.key for node in nodes if isinstance(node, LoRAWeight)]


def test_entries_are_dropped_on_the_way_to_the_adapter_and_the_others_are_larger():
    """`B (A dropout(x))` as PEFT has it; with units for `A` and `B` the sum shows the input."""
    unit = DenseWeight(jnp.eye(6).reshape(6, 2, 3)), DenseWeight(jnp.eye(6))
    weight = LoRAWeight(DenseWeight(jnp.ones((6, 2, 3))), *unit, alpha=12.0, dropout=DROPOUT)
    rows, seq = 100, 50
    x = jr.normal(jr.key(0), (rows, seq, 2, 3))
    base = weight.base.contract(x, "kv_heads head_dim", "embed")
    assert not keys_of(weight)[0]
    np.testing.assert_allclose(weight.contract(x, "kv_heads head_dim", "embed"), base + 2 * x.reshape(rows, seq, 6))
    weight = dataclasses.replace(weight, key=jr.split(jr.key(1), rows))
    came = np.asarray(weight.contract(x, "kv_heads head_dim", "embed") - base) / np.asarray(x).reshape(rows, seq, 6)
    kept = came > 1
    # To the rounding of a sum from which the base was taken away again, of numbers down to 1e-4.
    np.testing.assert_allclose(came[kept], 2 / (1 - DROPOUT), rtol=1e-2)
    np.testing.assert_allclose(came[~kept], 0, atol=1e-2)
    # Over all keys it is the input: within five standard deviations of a mean of so many draws, in all and by place.
    for axes, draws in (((0, 1, 2), kept.size), ((0, 1), rows * seq), ((0, 2), rows * 6), ((1, 2), seq * 6)):
        deviation = (DROPOUT * (1 - DROPOUT) / draws) ** 0.5
        assert np.abs(kept.mean(axes) - (1 - DROPOUT)).max() < 5 * deviation


@pytest.mark.slow
def test_each_layer_and_row_has_its_own_key():
    model = adapted(adapted(dropout=DROPOUT), targets=("q_proj",), dropout=DROPOUT)
    with_keys = with_dropout(stack(model), jr.key(0), jnp.arange(ROWS))
    found = [jr.key_data(key).reshape(-1, 2) for key in keys_of(with_keys)]
    twice = with_keys.pattern[0].attention.q_proj.weight.base
    found.append(jr.key_data(twice.key).reshape(-1, 2))
    assert len(np.unique(np.concatenate(found), axis=0)) == (len(LINEAR) + 1) * CONFIG.layers * ROWS


def test_without_dropout_there_is_no_key():
    stacked = stack(adapted(dropout=0.0))
    assert keys_of(with_dropout(stacked, jr.key(0), jnp.arange(ROWS))) == [None] * len(LINEAR)
    # As in PEFT a table has none, since rows are looked up; and here it is the head as well.
    tied = small_model(config=dataclasses.replace(CONFIG, tied=True))
    table = mx.apply_lora(tied, rank=2, alpha=4.0, targets=("embedding",), dropout=DROPOUT, key=jr.key(0))
    assert table.embedding.weight.dropout == 0


def test_a_model_with_dropout_says_what_it_says_without():
    run = eqx.filter_jit(lambda model, ids: model(ids))
    model, ids = adapted(dropout=0.9), jnp.asarray(batch().inputs)
    assert (run(model, ids) == run(adapted(), ids)).all()


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_it_would_have():
    """Beside weights that only dequantise; the state holds no key, and a step is made anew."""
    model = adapted(quantized(small_model(config=CONFIG)), dropout=0.9)
    # Nothing is learned, so that losses differ by what is dropped alone.
    optimizer = train.adamw(0.0)
    step = train.make_step(optimizer, compute_dtype=None, seed=1)
    state, losses, kept = train.TrainState.init(model, optimizer), [], None
    for number in range(4):
        if number == 2:
            kept = jax.tree.map(lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf, state)
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    assert len(set(losses)) == 4
    again = train.make_step(optimizer, compute_dtype=None, seed=1)
    for loss in losses[2:]:
        kept, metrics = again(kept, batch())
        assert float(metrics.loss) == loss
    unstacked = state.unstacked()
    assert type(unstacked.blocks[0].attention.q_proj.weight.base) is Int8Weight
    assert jax.tree.structure(unstacked) == jax.tree.structure(model)
    assert all(key is None for key in keys_of(unstacked))


def model64(dropout=DROPOUT):
    model = small_model(config=dataclasses.replace(CONFIG, tied=False), dtype=jnp.float64)
    return adapted(model, targets=(*LINEAR, "head"), rank=2, dtype=jnp.float64, dropout=dropout)


@pytest.mark.slow
def test_the_backward_pass_drops_what_the_forward_pass_did():
    """The gradient, for which blocks are computed again, against the difference of two forward passes."""
    with jax.enable_x64(True):
        stacked = with_dropout(stack(model64()), jr.key(0), jnp.arange(2, dtype=jnp.int32))
        weights, constants = eqx.partition(stacked, train.trained(stacked))
        draw = np.random.default_rng(1).standard_normal
        direction = jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape)), weights)

        @jax.jit
        def loss(weights):
            model = eqx.combine(weights, constants)
            rows = jax.tree.map(jnp.asarray, batch(2))
            wrapped = train.rematerialised("block")
            hidden = model.hidden(rows.inputs, rows.positions, rows.span, wrapped=wrapped)
            return train.loss_sums(model.head(), hidden, rows).loss

        size = 1e-5

        def moved(size):
            return loss(jax.tree.map(lambda leaf, way: leaf + size * way, weights, direction))

        slope = (moved(size) - moved(-size)) / (2 * size)
        products = jax.tree.map(lambda one, other: jnp.sum(one * other), jax.grad(loss)(weights), direction)
        # A central difference is off by the square of its step.
        assert relative_error(sum(jax.tree.leaves(products)), slope) < 1e-6


def trained(model, *, zero=0, **options):
    step = train.make_step(OPTIMIZER, compute_dtype=None, **options)
    state = train.TrainState.init(model, OPTIMIZER, dtype=jnp.float64, zero=zero)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    return losses, adapters(state.unstacked())


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        return trained(model64())


@pytest.mark.parametrize(
    ("axes", "strategy", "options"),
    [
        pytest.param({"dp": 2, "tp": 2}, mx.HEADS + "batch@dp", {"accumulate": 2}, marks=pytest.mark.long),
        ({"dp": 2, "kv": 2, "rep": 2}, mx.HEADS_X_HEAD_DIM + "batch@dp", {"zero": 3}),
    ],
    ids=["HEADS, in two parts", "HEADS_X_HEAD_DIM, ZeRO 3"],
)
@pytest.mark.slow
def test_the_steps_are_those_of_one_device(expected, axes, strategy, options):
    with jax.enable_x64(True):
        losses, after = trained(mx.shard(model64(), mx.make_mesh(axes), strategy), **options)
        # In float64 thousands of operations, each of them off by 1e-16; one entry dropped elsewhere would be 1e-3.
        np.testing.assert_allclose(losses, expected[0], rtol=1e-12)
        for one, other in zip(after, expected[1], strict=True):
            assert relative_error(one, other) < 1e-12


def test_folders_tell_the_dropout(tmp_path):
    model = small_model(config=CONFIG)
    mx.save_lora(adapted(model, dropout=0.25), tmp_path / "adapters")
    path = tmp_path / "adapters" / "adapter_config.json"
    settings = json.loads(path.read_text())
    assert settings["lora_dropout"] == 0.25
    assert mx.load_lora(model, tmp_path / "adapters").blocks[0].attention.q_proj.weight.dropout == 0.25
    path.write_text(json.dumps({name: value for name, value in settings.items() if name != "lora_dropout"}))
    assert mx.load_lora(model, tmp_path / "adapters").blocks[0].attention.q_proj.weight.dropout == 0
    for wrong in (1.0, "much"):
        path.write_text(json.dumps(settings | {"lora_dropout": wrong}))
        with refused("'lora_dropout'", repr(wrong)):
            mx.load_lora(model, tmp_path / "adapters")
    mixed = adapted(adapted(model, targets=("q_proj",), dropout=0.25), targets=("k_proj",))
    with refused("dropout", "merge"):
        mx.save_lora(mixed, tmp_path / "mixed")


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_what_is_no_dropout_is_refused(dropout):
    with refused("dropout", str(dropout)):
        mx.apply_lora(small_model(config=CONFIG), rank=2, alpha=4.0, dropout=dropout, key=jr.key(0))
