"""Experts on several devices: the results of one device, one psum a layer, and what cannot be split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.equality import FLOAT64_BOUND, logits_and_gradients, on, precision, random_model, worst_error
from fixtures.model import SMALL, relative_error, small_model
from fixtures.sharding import sharded
from jax.sharding import AbstractMesh

import mistral_eqx as mx
from mistral_eqx.parallel import specs, with_strategy
from mistral_eqx.parallel.mesh import make_mesh


CONFIG = dataclasses.replace(SMALL, vocab=64, layers=1, windows=(None,), routing=mx.Routing(experts=4, per_token=2))
TOKENS_SPLIT = mx.EXPERTS + "tokens@tp"
CASES = [
    (mx.EXPERTS, {"tp": 2}),
    (mx.HEADS, {"tp": 2}),
    (mx.Strategy("experts@ep"), {"ep": 4}),
    (mx.Strategy("experts@ep kv_heads@tp hidden@tp vocab@tp"), {"ep": 2, "tp": 2}),
    (mx.Strategy("experts@ep kv_heads@tp hidden@tp vocab@tp batch@dp"), {"dp": 2, "ep": 2, "tp": 2}),
    (mx.Strategy("experts@tp,ep kv_heads@tp"), {"tp": 2, "ep": 2}),
    (mx.Strategy("experts@ep kv_seq@ep head_dim@tp"), {"tp": 2, "ep": 2}),
    (mx.SEQUENCE_PARALLEL, {"tp": 2}),
    (TOKENS_SPLIT, {"tp": 2}),
]


@pytest.mark.parametrize(
    ("layout", "axes"), [("experts@ep hidden@tp", {"ep": 2, "tp": 4}), ("experts@ep batch@dp", {"ep": 4, "dp": 2})]
)
@pytest.mark.parametrize("seq", [1, 40])
def test_a_layer_is_that_of_one_device_after_one_sum(layout, axes, seq):
    strategy, module = mx.Strategy(layout), small_model(config=CONFIG).blocks[0].feed_forward
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, seq, SMALL.embed)), jnp.float32)
    split, spec = with_strategy(module, strategy), strategy.spec("batch seq embed")
    y, counts = sharded(lambda module, x: module(x), make_mesh(axes), (split, x), (specs(split, strategy), spec), spec)
    assert counts == {"all_reduce": 1}
    # The error of float32 in sums of 24 and 40 terms, taken in another order.
    assert relative_error(y, module(x)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "axes", "tied"),
    [*((*case, False) for case in CASES), *((*case, True) for case in CASES[:8:4])],
    ids=lambda case: getattr(case, "layout", None),
)
def test_logits_and_gradients_are_those_of_one_device(strategy, axes, tied):
    draw = np.random.default_rng(0).integers
    ids, targets = (jnp.asarray(draw(0, 64, (2, 8)), jnp.int32) for _ in range(2))
    with precision("float64"):
        model = random_model(dataclasses.replace(CONFIG, tied=tied), "float64")
        expected = logits_and_gradients(model, ids, targets)
        found = logits_and_gradients(on(model, strategy, axes), ids, targets)
        assert worst_error(found[0], expected[0]) < FLOAT64_BOUND
        assert worst_error(found[1], expected[1]) < FLOAT64_BOUND


# Tokens follow from logits; which device has the token that was chosen depends on these.
_TOKENS = [
    pytest.param(*case, marks=pytest.mark.long if number % 4 else pytest.mark.slow) for number, case in enumerate(CASES)
]


@pytest.mark.parametrize(("strategy", "axes"), _TOKENS, ids=lambda case: getattr(case, "layout", None))
def test_tokens_are_those_of_one_device(strategy, axes):
    model = small_model(config=CONFIG)
    prompts = [[5, 9, 2, 33, 1], [7, 7]]
    expected = mx.generate(model, prompts, max_new_tokens=24).tokens
    np.testing.assert_array_equal(mx.generate(on(model, strategy, axes), prompts, max_new_tokens=24).tokens, expected)


@pytest.mark.parametrize(
    ("layout", "axes", "sentence"),
    [
        ("experts@ep", {"ep": 3}, "4 experts cannot be split over 3 devices; leave 'experts' out of the strategy"),
        ("embed@ep", {"ep": 2}, "splits 'embed', which a model with experts cannot split"),
        ("experts@ep hidden@ep", {"ep": 2}, "over the same axis 'ep', and gate_proj has both"),
        ("experts@ep kv_heads@tp vocab@tp tokens@tp", {"ep": 2, "tp": 2}, "but none of 'experts hidden', whose sums"),
    ],
)
def test_what_cannot_be_split_is_refused(layout, axes, sentence):
    with pytest.raises(mx.InputError) as error:
        mx.Strategy(layout).check(CONFIG, AbstractMesh(tuple(axes.values()), tuple(axes)))
    assert sentence in str(error.value)


def test_a_dense_model_has_no_experts_to_split():
    with pytest.raises(mx.InputError, match="splits 'experts', but the model has none; leave 'experts' out of it"):
        mx.EXPERTS.check(SMALL, AbstractMesh((2,), ("tp",)))


def test_experts_are_among_the_choices():
    found = [choice.name for choice in mx.strategies(mx.PRESETS["8x7b"], 8) if "experts" in choice.strategy.layout]
    assert found == ["experts", "experts, batch over 2", "experts, batch over 4"]
    assert "experts" not in {choice.name for choice in mx.strategies(mx.PRESETS["7b-v0.2"], 8)}


def test_each_device_holds_its_own_experts():
    split = mx.shard(small_model(config=CONFIG), make_mesh({"ep": 4}), mx.Strategy("experts@ep"))
    layer = split.blocks[0].feed_forward
    assert {shard.data.shape for shard in layer.down_proj.weight.value.addressable_shards} == {(1, 24, 40)}
    # Every device has all scores of the router.
    assert {shard.data.shape for shard in layer.router.weight.value.addressable_shards} == {(4, 24)}
    assert len(jax.devices()) >= 4
