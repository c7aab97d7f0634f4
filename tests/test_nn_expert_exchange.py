"""Experts and tokens split over the same devices: the results of one device, whichever way tokens meet experts."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.equality import FLOAT64_BOUND, logits_and_gradients, on, precision, random_model, worst_error
from fixtures.model import SMALL, relative_error, small_model
from jax.sharding import AbstractMesh

import mistral_eqx as mx
from mistral_eqx.nn.expert_exchange import exchange_slots
from mistral_eqx.parallel import specs, with_strategy
from mistral_eqx.parallel.mesh import make_mesh


CONFIG = dataclasses.replace(
    SMALL,
    vocab=64,
    layers=1,
    windows=(None,),
    kv_heads=4,
    q_per_kv=1,
    max_positions=256,
    routing=mx.Routing(experts=8, per_token=2),
)
# 128 tokens on each of four devices are the fewest that travel by all_to_all.
SHAPE = (4, 128, SMALL.embed)


def _sent(experts, count):
    """The most tokens of a row that need one shard of `count` experts; each row is on a device of its own."""
    shards = np.asarray(experts) // count
    return max(np.any(row == shard, axis=-1).sum() for row in shards for shard in range(8 // count))


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        ("batch@dp experts@dp hidden@tp", {"dp": 4, "tp": 2}),
        pytest.param("batch@dp experts@ep,dp", {"dp": 4, "ep": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_layer_and_its_gradients_are_those_of_one_device(layout, axes):
    strategy, mesh = mx.Strategy(layout), make_mesh(axes)
    draw = np.random.default_rng(0).standard_normal
    with precision("float64"):
        module = random_model(CONFIG, "float64").blocks[0].feed_forward
        split, spec = with_strategy(module, strategy), strategy.spec("batch seq embed")
        arrays, static = eqx.partition(split, eqx.is_array)
        on_mesh = jax.shard_map(
            lambda arrays, x: eqx.combine(arrays, static)(x),
            mesh=mesh,
            in_specs=(specs(split, strategy), spec),
            out_specs=spec,
        )

        def found(arrays, x):
            y = on_mesh(arrays, x)
            return jnp.sum(jnp.sin(y)), y

        def expected(arrays, x):
            y = eqx.combine(arrays, eqx.filter(module, eqx.is_array, inverse=True))(x)
            return jnp.sum(jnp.sin(y)), y

        found, expected = (jax.jit(jax.value_and_grad(one, argnums=(0, 1), has_aux=True)) for one in (found, expected))
        count = 8 // strategy.parts("experts", mesh)
        # Tokens that are alike choose the same experts, so that they exceed the buffer of the device that has them.
        for x, fits in ((draw(SHAPE), True), (0.01 * draw(SHAPE) + draw(SMALL.embed), False)):
            x = jnp.asarray(x)
            assert bool(_sent(module.router(x)[0], count) <= exchange_slots(128, 2, 8, count)) is fits
            pairs = zip(jax.tree.leaves(found(arrays, x)), jax.tree.leaves(expected(arrays, x)), strict=True)
            assert max(relative_error(one, other) for one, other in pairs) < FLOAT64_BOUND


# All tokens of four rows and of their parts are on different devices, and so are the experts.
STRATEGY, AXES = mx.Strategy("kv_heads@tp experts@tp,dp vocab@tp batch@dp tokens@tp"), {"dp": 2, "tp": 4}


@pytest.mark.slow
def test_logits_and_gradients_are_those_of_one_device():
    draw = np.random.default_rng(0).integers
    ids, targets = (jnp.asarray(draw(0, 64, (4, 256)), jnp.int32) for _ in range(2))
    with precision("float64"):
        model = random_model(CONFIG, "float64")
        expected = logits_and_gradients(model, ids, targets)
        found = logits_and_gradients(on(model, STRATEGY, AXES), ids, targets)
        assert worst_error(found[0], expected[0]) < FLOAT64_BOUND
        assert worst_error(found[1], expected[1]) < FLOAT64_BOUND


@pytest.mark.slow
def test_tokens_are_those_of_one_device():
    model = small_model(config=CONFIG)
    draw = np.random.default_rng(0).integers
    prompts = [draw(0, 64, length).tolist() for length in (140, 9, 128, 33)]
    expected = mx.generate(model, prompts, max_new_tokens=16).tokens
    np.testing.assert_array_equal(mx.generate(on(model, STRATEGY, AXES), prompts, max_new_tokens=16).tokens, expected)


def test_the_way_follows_from_shapes():
    # Few tokens, and devices that need most of the tokens anyway: all devices gather them.
    assert exchange_slots(8, 2, 8, 1) == 8
    assert exchange_slots(4096, 2, 8, 4) == 4096
    # One and a half times the tokens of an even router.
    assert exchange_slots(4096, 2, 8, 1) == 1.5 * 4096 * 2 / 8
    assert exchange_slots(4096, 4, 64, 1) == 1.5 * 4096 * 4 / 64
    # Never more than what experts with a capacity compute.
    assert exchange_slots(4096, 2, 8, 1, most=1280) == 1280
    assert exchange_slots(4096, 2, 8, 1, most=2000) == 1.5 * 4096 * 2 / 8


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        ("batch@dp experts@dp", "6 experts cannot be split over 4 devices; leave 'experts' out of the strategy"),
        ("batch@dp hidden@dp", "'batch' and 'hidden' over the same axis 'dp', and the hidden activations have both"),
    ],
)
def test_what_cannot_be_split_is_refused(layout, sentence):
    config = dataclasses.replace(CONFIG, routing=mx.Routing(experts=6, per_token=2))
    with pytest.raises(mx.InputError, match=sentence):
        mx.Strategy(layout).check(config, AbstractMesh((4,), ("dp",)))
