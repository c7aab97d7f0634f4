"""State that is split over devices makes the same steps, and takes the memory and the exchanges that it should."""

import collections
import dataclasses
import functools
import math
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.generation import refused
from fixtures.model import SMALL, relative_error, small_model
from fixtures.sharding import exchanges

import mistral_eqx as mx
from mistral_eqx import train


CONFIG = dataclasses.replace(SMALL, vocab=64, layers=4, windows=(None,) * 4, q_per_kv=2)
OPTIMIZER = train.adamw(1e-2)
ROWS, SEQ = 8, 12
# In float64: thousands of operations, each of them off by 1e-16.
TOLERANCE = 1e-10


def batch(seed):
    draw = np.random.default_rng(seed)
    texts = [draw.integers(0, CONFIG.vocab, length) for length in draw.integers(2, SEQ + 1, ROWS)]
    return train.one_a_row([train.causal(text) for text in texts], SEQ)


def model64():
    return small_model(config=CONFIG, dtype=jnp.float64)


def placed(axes, strategy):
    return mx.shard(model64(), mx.make_mesh(axes), strategy)


def arrays(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_array))


def trained(model, steps, *, zero=0, accumulate=1, dtype=jnp.float64):
    """Losses, the state, and the weights after some steps."""
    state = train.TrainState.init(model, OPTIMIZER, dtype=dtype, zero=zero)
    step = train.make_step(OPTIMIZER, compute_dtype=None, accumulate=accumulate)
    losses = []
    for number in range(steps):
        state, metrics = step(state, batch(number))
        losses.append(float(metrics.loss))
    return losses, state, arrays(state.unstacked())


def assert_equal(found, expected):
    assert np.abs(np.subtract(found[0], expected[0])).max() < TOLERANCE
    worst = max(relative_error(one, other) for one, other in zip(found[2], expected[2], strict=True))
    assert worst < TOLERANCE
    return worst


def held(state):
    """Bytes of weights and of the optimizer's state on one device."""
    return [sum(leaf.addressable_shards[0].data.nbytes for leaf in arrays(tree)) for tree in (state.model, state)]


def test_the_steps_are_those_of_one_device():
    with jax.enable_x64(True):
        model = placed({"dp": 2, "tp": 2}, mx.HEADS + "batch@dp")
        assert_equal(trained(model, 3, zero=3), trained(model64(), 3))


STRATEGIES = {
    "alone": ({"dp": 4}, mx.Strategy("batch@dp")),
    "HEADS": ({"dp": 2, "tp": 2}, mx.HEADS + "batch@dp"),
    "SEQUENCE_PARALLEL": ({"dp": 2, "tp": 2}, mx.SEQUENCE_PARALLEL + "batch@dp"),
    "HEAD_DIM": ({"dp": 2, "tp": 2}, mx.HEAD_DIM + "batch@dp"),
    "KV_REPLICATED": ({"dp": 2, "kv": 2, "rep": 2}, mx.KV_REPLICATED + "batch@dp"),
    "HEADS_X_HEAD_DIM": ({"dp": 2, "kv": 2, "rep": 2}, mx.HEADS_X_HEAD_DIM + "batch@dp"),
    "HEADS_X_KV_SEQ": ({"dp": 2, "kv": 2, "rep": 2}, mx.HEADS_X_KV_SEQ + "batch@dp"),
}


# All four stages of all strategies in the long session; else all stages of one, and each other strategy at one stage.
ALL = bool(os.environ.get("EQUALITY_PAIRS"))
STAGES = {name: (1 + number % 3,) for number, name in enumerate(STRATEGIES)} | {"alone": range(4)}


@functools.cache
def twenty_steps_alone():
    with jax.enable_x64(True):
        return trained(model64(), 20)


# The others have other layouts of the same exchanges, and `alone` is the one with every stage.
_OFTEN = ("HEADS_X_KV_SEQ", "SEQUENCE_PARALLEL", "alone")


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _OFTEN else pytest.mark.long) for name in STRATEGIES]
)
def test_twenty_steps_at_every_stage(name):
    """And twice the rows a device in two parts, one after the other."""
    axes, strategy = STRATEGIES[name]
    with jax.enable_x64(True):
        expected = twenty_steps_alone()
        for zero in range(4) if ALL else STAGES[name]:
            found = trained(placed(axes, strategy), 20, zero=zero, accumulate=2)
            weights, state = held(found[1])
            print(f"| {name} | {zero} | {assert_equal(found, expected):.1e} | {weights:,} | {state - weights:,} |")  # noqa: T201


# An operation in float32 is off by half of this, and a number passes through some hundred of them in a step.
EPSILON32, OPERATIONS = 2.0**-23, 100


@pytest.mark.long
@pytest.mark.parametrize("name", ["HEADS_X_KV_SEQ", pytest.param("alone", marks=pytest.mark.long)])
def test_twenty_steps_in_float32(name):
    """Losses, as far as rounding can move them; docs/sharded_training.md derives the bound.

    Weights themselves have none worth the name: Adam makes a step of the learning rate of any gradient, also of one
    that is nothing but rounding.
    """
    axes, strategy = STRATEGIES[name]
    expected, _, _ = trained(small_model(config=CONFIG), 20, dtype=jnp.float32)
    rate = 1e-2
    each = 2 * rate * math.sqrt(CONFIG.parameters) * OPERATIONS * EPSILON32
    bound = OPERATIONS * EPSILON32 * np.array(expected) + each * np.arange(20)
    for zero in range(4) if ALL else (3,):
        model = mx.shard(small_model(config=CONFIG), mx.make_mesh(axes), strategy)
        losses, _, _ = trained(model, 20, zero=zero, accumulate=2, dtype=jnp.float32)
        off = np.abs(np.subtract(losses, expected))
        assert (off <= bound).all()
        print(f"| {name} | {zero} | {off.max():.1e} | {off[-1]:.1e} | {bound[-1]:.1e} |")  # noqa: T201


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_third_stage_holds_its_part_of_everything(devices):
    """12 of the 16 bytes a weight of which gradients are 4."""
    model = mx.shard(small_model(config=CONFIG), mx.make_mesh({"dp": devices}), mx.Strategy("batch@dp"))
    state = train.TrainState.init(model, OPTIMIZER, zero=3)
    _, both = held(state)
    # Three counts are whole.
    assert both == 12 * CONFIG.parameters // devices + 3 * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices", [pytest.param(2, marks=pytest.mark.long), 4, pytest.param(8, marks=pytest.mark.long)]
)
def test_a_step_of_the_third_stage_takes_its_part_and_a_layer(devices):
    """Of little activations: the state, the gradients, and one layer at a time."""
    layers = 16
    config = dataclasses.replace(CONFIG, layers=layers, windows=(None,) * layers, embed=64, hidden=256)
    model = mx.shard(small_model(config=config), mx.make_mesh({"dp": devices}), mx.Strategy("batch@dp"))
    state = train.TrainState.init(model, OPTIMIZER, zero=3)
    step = train.make_step(OPTIMIZER, compute_dtype=None)
    rows = train.one_a_row([train.causal([1, 2])] * devices, 1)
    sizes = eqx.filter_jit(step, donate="all").lower(state, rows).compile().compiled.memory_analysis()
    layer = sum(leaf.nbytes for leaf in arrays(model.blocks[0]))
    print(f"| {devices} | {held(state)[1]:,} | {sizes.temp_size_in_bytes:,} |")  # noqa: T201
    # One layer's weights and gradients are whole. The update is in place: no new moments are beside the old ones.
    assert held(state)[1] + sizes.temp_size_in_bytes < 16 * config.parameters / devices + 2 * layer


@pytest.mark.parametrize(
    ("axes", "strategy", "zero"),
    [
        pytest.param(None, mx.SINGLE, 0, marks=pytest.mark.long),
        ({"dp": 2, "tp": 2}, mx.HEADS + "batch@dp", 3),
    ],
)
@pytest.mark.slow
def test_moments_on_the_host_make_the_same_steps(axes, strategy, zero):
    found = []
    for offload in (False, True):
        model = small_model(config=CONFIG)
        model = model if axes is None else mx.shard(model, mx.make_mesh(axes), strategy)
        state = train.TrainState.init(model, OPTIMIZER, zero=zero, offload=offload)
        step = train.make_step(OPTIMIZER)
        for number in range(2):
            assert memories(state.model) == {"device"}
            # A single number is not worth the way.
            assert memories(state.optimizer_state) == {"pinned_host" if offload else "device"}
            state, _ = step(state, batch(number))
        assert memories(state.optimizer_state) == {"pinned_host" if offload else "device"}
        found.append([np.asarray(leaf) for leaf in arrays(state)])
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def memories(tree):
    return {leaf.sharding.memory_kind for leaf in arrays(tree) if leaf.ndim}


def test_a_device_without_memory_of_the_host_is_refused(monkeypatch):
    class Device:
        platform = "abacus"

        def addressable_memories(self):
            return []

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    with refused("abacus", "'pinned_host'", "offload=True"):
        train.TrainState.init(small_model(config=CONFIG), OPTIMIZER, offload=True)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_each_device_holds_its_part_and_no_more(zero):
    devices = 4
    model = mx.shard(small_model(config=CONFIG), mx.make_mesh({"dp": devices}), mx.Strategy("batch@dp"))
    state = train.TrainState.init(model, OPTIMIZER, zero=zero)
    weights = sum(leaf.nbytes for leaf in arrays(model))
    found, both = held(state)
    # Every dimension of the config divides by 4 here; five numbers count steps.
    assert found == (weights // devices if zero == 3 else weights)
    moments = 2 * weights
    assert 0 <= both - found - moments // (devices if zero else 1) <= 20


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.slow
def test_what_a_step_exchanges(zero):
    """In float32 on four devices: bytes of the operands, by kind, of arrays; scalars are left out."""
    devices, accumulate = 4, 1
    model = mx.shard(small_model(config=CONFIG), mx.make_mesh({"dp": devices}), mx.Strategy("batch@dp"))
    state = train.TrainState.init(model, OPTIMIZER, zero=zero)
    step = train.make_step(OPTIMIZER, compute_dtype=None, accumulate=accumulate)
    found = collections.Counter()
    for (kind, size, group), times in exchanges(eqx.filter_jit(step).lower(state, batch(0))).items():
        assert group == devices
        if size > 8:
            found[kind] += size * times
    whole = sum(leaf.nbytes for leaf in arrays(model))
    blocks = sum(leaf.nbytes for leaf in arrays(model.blocks))
    outer = whole - blocks
    part = whole // devices
    assert (
        found
        == {
            0: {"all_reduce": whole},
            1: {"all_reduce": whole, "all_gather": part},
            2: {"reduce_scatter": whole, "all_gather": part},
            # Blocks forward and backward; the table to look up ids, and what stands around the blocks for the head.
            3: {"reduce_scatter": whole, "all_gather": (2 * blocks + outer) // devices},
        }[zero]
    )


@pytest.mark.slow
def test_a_layer_that_was_gathered_is_let_go_of():
    """The memory of a step's own arrays does not grow with the number of layers by their weights."""
    temporary = {}
    for layers in (4, 12):
        config = dataclasses.replace(CONFIG, layers=layers, windows=(None,) * layers, embed=64, hidden=256)
        model = mx.shard(small_model(config=config), mx.make_mesh({"dp": 4}), mx.Strategy("batch@dp"))
        state = train.TrainState.init(model, OPTIMIZER, zero=3)
        step = train.make_step(OPTIMIZER, compute_dtype=None)
        compiled = eqx.filter_jit(step).lower(state, batch(0)).compile().compiled
        layer = sum(leaf.nbytes for leaf in arrays(model.blocks[0]))
        temporary[layers] = compiled.memory_analysis().temp_size_in_bytes, layer
    (few, layer), (many, _) = temporary.values()
    # Eight layers more: of each a quarter as gradient, and the residual stream of two rows.
    stream = math.prod((ROWS // 4, SEQ, 64)) * 4
    assert many - few < 8 * (layer / 4 + stream) * 1.5


def test_bad_stages():
    model = small_model(config=CONFIG)
    with refused("ZeRO 3", "batch@dp"):
        train.TrainState.init(model, OPTIMIZER, zero=3)
    with refused("no ZeRO stage 4"):
        train.TrainState.init(model, OPTIMIZER, zero=4)
    split = mx.shard(model, mx.make_mesh({"dp": 2}), mx.Strategy("batch@dp"))
    state = train.TrainState.init(split, OPTIMIZER, zero=3)
    with refused("ZeRO 3", "'block'"):
        train.make_step(OPTIMIZER, remat="none")(state, batch(0))
