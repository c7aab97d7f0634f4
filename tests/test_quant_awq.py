"""AWQ: factors that change no function, and a smaller error of the outputs than round to nearest."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.checkpoint import random_model, tiny
from fixtures.generation import refused
from fixtures.model import relative_error

import mistral_eqx as mx
from mistral_eqx.nn import DenseWeight
from mistral_eqx.nn.layers import adaptable_layers
from mistral_eqx.quant import AbstractCalibratedScheme, Inputs


CONFIG = tiny(embed=32, hidden=64, vocab=64, q_per_kv=2)


@pytest.fixture
def model(getkey):
    return random_model(CONFIG, getkey())


def ids(rows=4, seq=24):
    return np.random.default_rng(0).integers(0, 64, (rows, seq))


@dataclasses.dataclass(frozen=True)
class Scaled(AbstractCalibratedScheme):
    """Scales inputs by powers of their magnitudes, and rounds nothing."""

    exponent: float

    def factors(self, numbers, inputs):
        return (inputs.magnitude**self.exponent).astype(np.float32)

    def weight(self, numbers, layer, inputs):
        return DenseWeight(jnp.asarray(numbers))


@pytest.mark.parametrize(
    "recipe",
    [
        Scaled(0.5),
        # A layer beside them without a scheme is scaled too, and so is what produces their input.
        {"*.k_proj": Scaled(1.0), "*.o_proj": Scaled(0.7), "*.0.*.up_proj": Scaled(0.2), "*.down_proj": Scaled(-1.0)},
        {"*.q_proj": Scaled(1.0), "*.v_proj": Scaled(0.5)},
    ],
)
def test_factors_change_no_function(recipe, model):
    scaled = mx.quantize(model, recipe, calibration=ids())
    for path in ("attention.q_proj", "attention.k_proj", "attention.v_proj"):
        first, second = (adaptable_layers(one.blocks[0])[path].weight.dense() for one in (model, scaled))
        assert relative_error(second, first) > 0.01
    tokens = jnp.asarray(ids(2, 6))
    # Factors are multiplied and divided in float32.
    assert relative_error(eqx.filter_jit(scaled)(tokens), eqx.filter_jit(model)(tokens)) < 2e-5


def output_error(numbers, found, x):
    return np.sum(np.square(x @ (found - numbers).astype(np.float64).T))


def test_the_ratio_with_the_least_error_of_the_outputs_is_taken():
    draw = np.random.default_rng(0)
    # A few inputs are large, as in language models.
    x = draw.standard_normal((256, 64)) * np.exp(draw.standard_normal(64))
    weights = {name: draw.standard_normal((32, 64)).astype(np.float32) for name in ("a", "b")}
    magnitude = np.abs(x).mean(axis=0).astype(np.float32)
    inputs = Inputs((2 * x.T @ x / 256).astype(np.float32), magnitude)
    errors = {}
    for number in range(20):
        powers = magnitude ** np.float32(number / 20)
        factors = powers / np.sqrt(powers.max() * powers.min())
        rounding, layer = mx.RTN(bits=3, group_size=16), mx.quant.Layer("layer", 1)
        errors[number] = sum(
            output_error(own, np.asarray(rounding.weight(own * factors, layer).dense()) / factors, x)
            for own in weights.values()
        )
    best = min(errors, key=errors.get)
    assert 0 < best < 19
    assert errors[best] < 0.8 * errors[0]
    powers = magnitude ** np.float32(best / 20)
    found = mx.AWQ(bits=3, group_size=16).factors(weights, inputs)
    np.testing.assert_allclose(found, powers / np.sqrt(powers.max() * powers.min()), rtol=1e-6)


def test_codes_are_those_of_round_to_nearest_after_scaling(model):
    small = mx.quantize(model, {"blocks.0.*": mx.AWQ(group_size=16)}, calibration=ids())
    for index, (first, second) in enumerate(zip(model.blocks, small.blocks, strict=True)):
        changed = [not eqx.tree_equal(one, other) for one, other in zip(_norms(first), _norms(second), strict=True)]
        assert changed == [index == 0] * 2
    factors = np.asarray(model.blocks[0].attention_norm.weight) / np.asarray(small.blocks[0].attention_norm.weight)
    numbers = np.asarray(model.blocks[0].attention.q_proj.weight.dense()) * factors
    expected = mx.RTN(group_size=16).weight(numbers, mx.quant.Layer("q", 3)).dense()
    # The factors of a quotient differ from those that were used by rounding, and so do scales.
    assert relative_error(small.blocks[0].attention.q_proj.weight.dense(), expected) < 1e-5


@pytest.mark.parametrize("zero_point", [False, True])
def test_clipping_lowers_the_error_of_each_layers_output(zero_point):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((256, 64)) @ draw.standard_normal((64, 64)) * np.exp(draw.standard_normal(64))
    inputs = Inputs((2 * x.T @ x / 256).astype(np.float32), np.abs(x).mean(axis=0).astype(np.float32))
    numbers = draw.standard_t(3, (32, 64)).astype(np.float32)
    errors = []
    for clip in (False, True):
        scheme = mx.AWQ(bits=3, group_size=16, zero_point=zero_point, clip=clip)
        layers = (mx.quant.Layer(name, 1) for name in ("q_proj", "up_proj"))
        found = [np.asarray(scheme.weight(numbers, layer, inputs).dense()) for layer in layers]
        errors.append([[output_error(numbers[[row]], one[[row]], x) for row in range(32)] for one in found])
    (queries, without), (same, clipped) = np.array(errors)
    np.testing.assert_array_equal(queries, same)
    # Products of the Hessian in float32.
    assert (clipped <= without * (1 + 1e-4)).all()
    assert clipped.sum() < 0.95 * without.sum()


def _norms(block):
    return block.attention_norm, block.feed_forward_norm


def test_what_cannot_be_scaled_is_refused(model):
    first = mx.quantize(model, {"*.v_proj": mx.NF4(16)})
    with refused("blocks.0.attention.v_proj", "BlockWeight", "scheme"):
        mx.quantize(first, {"*.o_proj": mx.AWQ(group_size=16)}, calibration=ids())
    with refused("blocks.0.attention.q_proj", "32 inputs", "128"):
        mx.quantize(model, mx.AWQ(), calibration=ids())


@pytest.mark.slow
def test_smollm2_foretells_a_text_better_than_rounded_to_nearest(smollm2_path):
    """Calibrated on the beginning of a book, and measured on its end."""
    model, tokenizer = mx.from_pretrained(smollm2_path, dtype="float32")
    text = (Path(__file__).parents[1] / "examples/data/moby-dick.txt").read_text(encoding="utf-8")
    tokens = np.asarray(tokenizer.encode(text)[:4096]).reshape(8, 512)
    scaled = mx.quantize(model, mx.AWQ(group_size=64), calibration=tokens)
    models = model, scaled, mx.quantize(model, mx.RTN(group_size=64))
    floats, awq, nearest = (mx.perplexity(one, tokenizer, text[-2000:], context=512).perplexity for one in models)
    assert floats < awq < nearest
