"""GPTQ, compared with the update by an explicit inverse Hessian, and what all calibrated schemes share.

`GPTQ_BLOCKS` is how many of SmolLM2's 30 blocks are compared with rounding to nearest.
"""

import dataclasses
import os
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.checkpoint import random_model, tiny
from fixtures.generation import refused
from fixtures.model import relative_error

import mistral_eqx as mx
from mistral_eqx.nn import DenseWeight
from mistral_eqx.nn.layers import adaptable_layers
from mistral_eqx.quant import AbstractCalibratedScheme, Inputs, Layer, OrderedWeight, blockwise, formats
from mistral_eqx.quant.gptq import inverse_factor, rounded
from mistral_eqx.quant.integers import grid, nearest


BLOCKS = int(os.environ.get("GPTQ_BLOCKS", "4"))
CONFIG = tiny(embed=32, hidden=64, vocab=64, q_per_kv=2)


@pytest.fixture
def model(getkey):
    return random_model(CONFIG, getkey())


def ids(rows=4, seq=24, vocab=64):
    return np.random.default_rng(0).integers(0, vocab, (rows, seq))


def statistics(inputs, tokens=200, seed=0):
    """The Hessian of random inputs that depend on each other."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((tokens, inputs)) @ draw.standard_normal((inputs, inputs))
    return Inputs((2 * x.T @ x / tokens).astype(np.float32), np.abs(x).mean(axis=0).astype(np.float32))


def error(change, hessian):
    """Twice the mean squared error of the outputs."""
    change = np.asarray(change, np.float64).reshape(-1, hessian.shape[0])
    return np.sum((change @ hessian) * change)


def by_inverse_hessian(numbers, hessian, bits, group_size, zero_point):
    """Optimal Brain Quantization in the order of the columns (the paper's equations 2 and 3), in float64.

    The inverse of the Hessian of the columns that are left loses one row and column at each step.
    """
    numbers = numbers.astype(np.float64)
    inverse, codes = np.linalg.inv(hessian.astype(np.float64)), np.zeros(numbers.shape, np.uint8)
    for at in range(numbers.shape[1]):
        if at % group_size == 0:
            scale, zero = grid(numbers[:, at : at + group_size].astype(np.float32), bits, zero_point=zero_point)
        column = numbers[:, at : at + 1].astype(np.float32)
        codes[:, at : at + 1] = nearest(column, scale, zero, bits, zero_point=zero_point)
        found = scale * (codes[:, at : at + 1] - zero)
        numbers[:, at:] -= (numbers[:, at : at + 1] - found) / inverse[0, 0] * inverse[0]
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return codes


@pytest.mark.parametrize(("bits", "group_size", "zero_point"), [(4, 16, True), (2, 48, True), (3, 8, False)])
def test_codes_are_those_of_the_update_by_the_inverse_hessian(bits, group_size, zero_point):
    numbers = np.random.default_rng(1).standard_normal((24, 48)).astype(np.float32)
    hessian = statistics(48).hessian
    damped = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(48, dtype=np.float32)
    expected = by_inverse_hessian(numbers, damped, bits, group_size, zero_point)
    options = {"bits": bits, "group_size": group_size, "zero_point": zero_point}
    codes, scale, zero = rounded(jnp.asarray(numbers), inverse_factor(hessian, 0.01), **options, batch=group_size)
    np.testing.assert_array_equal(codes, expected)
    found = mx.GPTQ(bits, group_size, zero_point).weight(numbers, Layer("layer", 1), statistics(48)).dense()
    shared = (np.repeat(np.asarray(each), group_size, axis=1) for each in (scale, zero))
    dense = next(shared) * (expected - next(shared))
    np.testing.assert_array_equal(found, dense)


def test_lazy_batches_change_nothing():
    numbers = jnp.asarray(np.random.default_rng(1).standard_normal((16, 64)), jnp.float32)
    factor = inverse_factor(statistics(64).hessian, 0.01)
    options = {"bits": 4, "group_size": 32, "zero_point": True}
    lazy, single = (rounded(numbers, factor, **options, batch=batch) for batch in (32, 1))
    np.testing.assert_array_equal(lazy[0], single[0])
    # The updates are sums in another order, of numbers of about 1.
    np.testing.assert_allclose(lazy[1], single[1], rtol=1e-5)


def test_the_factor_is_that_of_the_inverse():
    hessian = statistics(40).hessian
    upper = np.asarray(inverse_factor(hessian, 0.01), np.float64)
    np.testing.assert_array_equal(upper, np.triu(upper))
    damped = hessian + 0.01 * np.diagonal(hessian).mean() * np.eye(40)
    # The inverse of a triangular matrix in float32, whose condition is about 100.
    assert relative_error(upper.T @ upper @ damped, np.eye(40)) < 1e-3


@pytest.mark.parametrize("scheme", [mx.GPTQ(3, 16), mx.GPTQ(3, 16, act_order=True), mx.GPTQ(8, 64, zero_point=False)])
def test_the_error_of_the_outputs_is_below_round_to_nearest(scheme):
    numbers = np.random.default_rng(1).standard_normal((4, 8, 2, 32)).astype(np.float32)
    inputs, layer = statistics(64), Layer("layer", 2)
    plain = mx.RTN(scheme.bits, scheme.group_size, scheme.zero_point).weight(numbers, layer).dense()
    found = scheme.weight(numbers, layer, inputs).dense()
    assert found.shape == numbers.shape
    assert error(found - numbers, inputs.hessian) < 0.6 * error(plain - numbers, inputs.hessian)


def test_act_order_sorts_inputs_by_their_mean_squares():
    numbers = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)
    inputs = statistics(32)
    order = np.argsort(-np.diagonal(inputs.hessian))
    found = mx.GPTQ(4, 16, act_order=True).weight(numbers, Layer("layer", 1), inputs)
    assert isinstance(found, OrderedWeight)
    np.testing.assert_array_equal(np.sort(found.order[:16]), np.sort(order[:16]))
    in_order = Inputs(inputs.hessian[np.ix_(order, order)], inputs.magnitude[order])
    expected = mx.GPTQ(4, 16).weight(numbers[:, order], Layer("layer", 1), in_order).dense()
    np.testing.assert_array_equal(found.dense()[:, order], expected)


def test_an_input_without_activations_has_no_weight():
    numbers, inputs = np.ones((8, 32), np.float32), statistics(32)
    inputs.hessian[5] = inputs.hessian[:, 5] = 0
    found = mx.GPTQ(4, 16).weight(numbers, Layer("layer", 1), inputs).dense()
    np.testing.assert_array_equal(found[:, 5], 0)
    assert (np.asarray(found)[:, :5] > 0.9).all()


def test_statistics_are_those_of_the_inputs_of_layers(model):
    """The input of a layer, recomputed from the parts of a block."""
    tokens, block = jnp.asarray(ids(2, 8)), model.blocks[0]
    context = mx.nn.Context.init(CONFIG.rope, jnp.arange(8, dtype=jnp.int32)[None])
    of_both = mx.nn.Context.init(CONFIG.rope, jnp.tile(jnp.arange(8, dtype=jnp.int32), (2, 1)))
    x = model.embedding(tokens)
    after = x + block.attention(block.attention_norm(x), of_both)[0]
    y = block.feed_forward_norm(after)
    hidden = jax.nn.silu(block.feed_forward.gate_proj(y)) * block.feed_forward.up_proj(y)
    expected = {
        "attention.q_proj": block.attention_norm(x),
        "feed_forward.gate_proj": y,
        "feed_forward.down_proj": hidden,
    }
    schemes = blockwise._OwnSchemes("blocks.0.", dict.fromkeys(adaptable_layers(block), mx.GPTQ()))
    found = blockwise._observed(block, schemes, [x[:1], x[1:]], context)
    assert len(found) == 4
    for shared, own in found.items():
        if shared.layers[0] in expected:
            flat = np.asarray(expected[shared.layers[0]], np.float64).reshape(16, -1)
            # Sums of 16 products in float32.
            assert relative_error(own.hessian, 2 * flat.T @ flat / 16) < 1e-5
            assert relative_error(own.magnitude, np.abs(flat).mean(axis=0)) < 1e-5


@pytest.mark.slow
def test_a_block_sees_the_quantized_blocks_before_it(model):
    scheme = mx.GPTQ(group_size=16)
    small = mx.quantize(model, scheme, calibration=ids())
    first = mx.quantize(model, {"blocks.0.*": scheme}, calibration=ids())
    # The second block of a model whose first is quantized already.
    again = mx.quantize(first, {"blocks.1.*": scheme}, calibration=ids())
    alone = mx.quantize(model, {"blocks.1.*": scheme}, calibration=ids())

    def down(model):
        return model.blocks[1].feed_forward.down_proj.weight.blocks

    np.testing.assert_array_equal(down(again), down(small))
    assert (np.asarray(down(alone)) != np.asarray(down(small))).any()


RECIPES = {
    "gptq": mx.GPTQ(group_size=16),
    "gptq, sorted": mx.GPTQ(group_size=16, act_order=True),
    "mixed": {
        "*.v_proj": mx.Int8(),
        "*.0.attention.*": mx.GPTQ(3, 16),
        "*.down_proj": mx.AWQ(group_size=16),
        "blocks.*": mx.NF4(16),
        "embedding": mx.GGUF("Q8_0"),
    },
}


@pytest.mark.parametrize(
    "name", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("gptq", "gptq, sorted")), "mixed"]
)
def test_a_model_is_calibrated_and_everything_works_on_it(name, model, getkey):
    done = []
    small = mx.quantize(model, RECIPES[name], calibration=ids(), progress=lambda *counts: done.append(counts))
    assert done == [(at, len(done)) for at in range(1, len(done) + 1)]
    assert len(done) == 14 + (name == "mixed")
    tokens = jnp.asarray(ids(2, 6))
    logits = eqx.filter_jit(small)(tokens)
    # Float32 sums, with scales before or after them.
    assert relative_error(logits, eqx.filter_jit(mx.dequantize(small))(tokens)) < 1e-5
    tuned = mx.apply_lora(small, rank=2, alpha=4.0, key=getkey())
    np.testing.assert_array_equal(eqx.filter_jit(tuned)(tokens), logits)
    mesh = mx.make_mesh("tp=2")
    if name == "gptq, sorted":
        with refused("o_proj", "kv_heads"):
            mx.shard(small, mesh, mx.HEADS)
        return
    split = mx.shard(small, mesh, mx.HEADS)
    assert relative_error(eqx.filter_jit(split)(tokens), logits) < 1e-5


def test_ids_may_be_lists(model):
    first, second = (mx.quantize(model, mx.GPTQ(group_size=16), calibration=one) for one in (ids(), ids().tolist()))
    assert formats(first) == ["INT4/16"]
    assert eqx.tree_equal(first, second)


def test_what_cannot_calibrate_is_refused(model, getkey):
    scheme = mx.GPTQ(group_size=16)
    for wrong in (ids()[0], ids() / 2, [[1, 2], [3]], [["a"]], ids() > 3):
        with refused("calibration", "(rows, seq)"):
            mx.quantize(model, scheme, calibration=wrong)
    with refused("calibration", "64", "0 to 63"):
        mx.quantize(model, scheme, calibration=ids(vocab=65))
    with refused("calibration", "rows of 80", "64"):
        mx.quantize(model, scheme, calibration=ids(2, 80))
    with refused("calibration", "63 tokens", "64 are needed"):
        mx.quantize(model, scheme, calibration=ids(3, 21))
    with refused("blocks.0.attention.q_proj", "GPTQ", "calibration=ids"):
        mx.quantize(model, scheme)
    with refused("embedding", "GPTQ", "blocks"):
        mx.quantize(model, {"*": scheme}, calibration=ids())
    with refused("calibration", "mx.GPTQ()"):
        mx.quantize(model, mx.NF4(16), calibration=ids())
    with refused("mesh", "mx.shard"):
        mx.quantize(mx.shard(model, mx.make_mesh("tp=2"), mx.HEADS), scheme, calibration=ids())
    with refused("q_proj", "32 inputs", "128", "32"):
        mx.quantize(model, mx.GPTQ(), calibration=ids())
    with refused("adapter", "merge"):
        mx.quantize(mx.apply_lora(model, rank=2, alpha=4.0, key=getkey()), scheme, calibration=ids())
    broken = eqx.tree_at(lambda model: model.blocks[0].attention_norm.weight, model, jnp.full(32, jnp.nan))
    with refused("blocks.0.attention.q_proj", "not finite"):
        mx.quantize(broken, scheme, calibration=ids())
    for make, words in (
        (lambda: mx.GPTQ(bits=9), ("GPTQ", "bits")),
        (lambda: mx.GPTQ(group_size=12), ("GPTQ", "group_size")),
        (lambda: mx.GPTQ(damping=0.0), ("damping",)),
        (lambda: mx.AWQ(bits=1), ("AWQ", "bits")),
    ):
        with refused(*words):
            make()


def test_a_scheme_with_calibration_is_refused_where_weights_are_read(model, tmp_path):
    mx.save(model, tmp_path / "model")
    with refused("q_proj", "GPTQ", "loaded"):
        mx.load(tmp_path / "model", quantize=mx.GPTQ())


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    [
        mx.GPTQ(group_size=16),
        mx.GPTQ(8, 16, zero_point=False, act_order=True),
        mx.AWQ(group_size=16),
    ],
)
def test_what_is_saved_is_loaded(scheme, model, tmp_path):
    small = mx.quantize(model, scheme, calibration=ids())
    mx.save(small, tmp_path / "small")
    again = mx.load(tmp_path / "small")
    assert formats(again) == formats(small)
    tokens = jnp.asarray(ids(2, 6))
    np.testing.assert_array_equal(eqx.filter_jit(again)(tokens), eqx.filter_jit(small)(tokens))


@pytest.mark.slow
def test_smollm2_has_less_error_in_every_layer(smollm2_path):
    """Each linear layer rounded on its own, on the Hessian of the float model."""
    whole, tokenizer = mx.from_pretrained(smollm2_path, dtype="float32")
    config = dataclasses.replace(whole.config, layers=BLOCKS, windows=whole.config.windows[:BLOCKS])
    model = dataclasses.replace(whole, config=config, blocks=whole.blocks[:BLOCKS])
    text = (Path(__file__).parents[1] / "examples/data/moby-dick.txt").read_text(encoding="utf-8")
    tokens = np.asarray(tokenizer.encode(text)[:2048]).reshape(4, 512)
    shares = []

    @dataclasses.dataclass(frozen=True)
    class Compared(AbstractCalibratedScheme):
        def weight(self, numbers, layer, inputs):
            small = mx.GPTQ(group_size=64).weight(numbers, layer, inputs)
            plain = mx.RTN(group_size=64).weight(numbers, layer)
            errors = [error(np.asarray(one.dense()) - numbers, inputs.hessian) for one in (small, plain)]
            shares.append(errors[0] / errors[1])
            return DenseWeight(jnp.asarray(numbers))

    mx.quantize(model, Compared(), calibration=tokens)
    assert len(shares) == 7 * BLOCKS
    assert max(shares) < 1
