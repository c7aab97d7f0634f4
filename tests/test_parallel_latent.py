"""Latent attention on several devices: the results of one device, what they exchange, and what cannot be split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.equality import FLOAT64_BOUND, logits_and_gradients, on, precision, random_model, worst_error
from fixtures.generation import refused
from fixtures.latent import DENSE, LATENT
from fixtures.model import small_model
from jax.sharding import AbstractMesh
from test_parallel_communication import _counted, _forward, _on, _prefill, _step

import mistral_eqx as mx
from mistral_eqx.parallel.mesh import make_mesh
from mistral_eqx.planning import Training, communication, training_step


# The default run has this one, of a dense layer: experts are slow to compile.
HEADS_AND_SLOTS = (mx.HEADS_X_KV_SEQ + "batch@dp", {"dp": 2, "kv": 2, "rep": 2})
CASES = [
    (mx.HEADS, {"tp": 4}),
    (mx.SEQUENCE_PARALLEL, {"tp": 2}),
    (mx.EXPERTS, {"tp": 2}),
    (mx.Strategy("experts@ep kv_heads@tp hidden@tp vocab@tp tokens@tp"), {"ep": 2, "tp": 2}),
    (mx.Strategy("kv_seq@a,b"), {"a": 2, "b": 4}),
]
MARKED = [HEADS_AND_SLOTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)]


@pytest.mark.parametrize(("strategy", "axes"), MARKED, ids=lambda case: getattr(case, "layout", None))
def test_logits_and_gradients_are_those_of_one_device(strategy, axes):
    draw = np.random.default_rng(0).integers
    ids, targets = (jnp.asarray(draw(0, 64, (2, 8)), jnp.int32) for _ in range(2))
    with precision("float64"):
        model = random_model(DENSE if (strategy, axes) == HEADS_AND_SLOTS else LATENT, "float64")
        expected = logits_and_gradients(model, ids, targets)
        found = logits_and_gradients(on(model, strategy, axes), ids, targets)
        assert worst_error(found[0], expected[0]) < FLOAT64_BOUND
        assert worst_error(found[1], expected[1]) < FLOAT64_BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "axes"),
    [
        pytest.param(*case, marks=pytest.mark.long if case in CASES[1:3] else ())
        for case in (HEADS_AND_SLOTS, *CASES[1:4])
    ],
    ids=lambda case: getattr(case, "layout", None),
)
def test_tokens_are_those_of_one_device(strategy, axes):
    model = small_model(config=LATENT)
    prompts = [[5, 9, 2, 33, 1], [7, 7]]
    expected = mx.generate(model, prompts, max_new_tokens=16, eos_id=()).tokens
    found = mx.generate(on(model, strategy, axes), prompts, max_new_tokens=16, eos_id=()).tokens
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("layout", "axes"),
    [
        ("experts@ep kv_heads@tp hidden@tp vocab@tp tokens@tp", "ep=2,tp=2"),
        pytest.param(
            "kv_heads@kv kv_seq@rep hidden@kv,rep vocab@kv,rep batch@dp", "dp=2,kv=2,rep=2", marks=pytest.mark.slow
        ),
    ],
)
def test_the_closed_form_is_what_the_programs_exchange(layout, axes):
    model = _on(layout, axes, config=LATENT)
    form, sizes = (LATENT, model.strategy, model.mesh.shape), {"batch": 2, "dtype": "float32"}
    assert _forward(model, 2, 12) == _counted(communication.forward_pass(*form, seq=12, **sizes))
    assert _prefill(model, 2, 5, 32) == _counted(communication.prefill(*form, seq=5, kv_seq=32, **sizes))
    step = communication.decoding_step(*form, kv_seq=32, **sizes)
    assert _step(model, 2, 32, mx.Sampler()) == _counted(step)


def test_each_device_has_its_heads_and_all_latents():
    split = mx.shard(small_model(config=LATENT), make_mesh({"tp": 4}), mx.HEADS)
    layer = split.blocks[0].attention

    def shapes(array):
        return {shard.data.shape for shard in array.addressable_shards}

    assert shapes(layer.q_b_proj.weight.value) == {(1, 16, 20)}
    assert shapes(layer.kv_b_proj.weight.value) == {(1, 24, 26)}
    assert shapes(layer.o_proj.weight.value) == {(24, 1, 14)}
    assert shapes(layer.kv_a_proj.weight.value) == {(32, 24)}
    assert shapes(layer.q_a_norm.weight) == {(20,)}
    cache = mx.parallel.specs(mx.nn.Cache.init(LATENT, 2, 8), mx.HEADS_X_KV_SEQ + "batch@dp")
    assert cache.layers[0].k_buffer.numbers == jax.P("dp", None, "rep", None)


@pytest.mark.parametrize(
    ("layout", "axes", "words"),
    [
        ("head_dim@tp", {"tp": 2}, "splits 'head_dim', which a model with latent attention cannot split"),
        ("q_per_kv@tp", {"tp": 2}, "splits 'q_per_kv', which a model with latent attention cannot split"),
        ("embed@tp", {"tp": 2}, "splits 'embed', which a model with"),
        ("kv_heads@tp", {"tp": 3}, "4 kv_heads cannot be split over 3 devices"),
        ("hidden@tp", {"tp": 16}, "40 hidden cannot be split over 16 devices"),
        ("kv_rank@tp", {"tp": 2}, "splits 'kv_rank', which is not a dimension that can be split"),
        ("experts@tp kv_heads@tp vocab@tp tokens@tp", {"tp": 2}, "but none of 'hidden', whose sums are scattered"),
    ],
)
def test_what_cannot_be_split_is_refused(layout, axes, words):
    with refused(words):
        mx.Strategy(layout).check(LATENT, AbstractMesh(tuple(axes.values()), tuple(axes)))


def test_the_choices_of_a_large_model():
    names = {choice.name for choice in mx.strategies(mx.PRESETS["small-4-119b"], 8)}
    assert {"heads", "sequence_parallel", "experts", "heads_x_kv_seq"} <= names
    assert not {"head_dim", "kv_replicated", "heads_x_head_dim"} & names


def test_a_training_step_has_no_closed_form():
    with refused("no closed form of a training step of a model with latent attention"):
        training_step(DENSE, mx.HEADS, {"tp": 2}, batch=2, training=Training(8))
