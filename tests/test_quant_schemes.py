"""Quantization schemes: codes by their definition, products as those of the dequantized weight, under strategies."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.cases import every_third
from fixtures.checkpoint import assert_same_weights, random_model, tiny
from fixtures.generation import refused
from fixtures.model import relative_error

import mistral_eqx as mx
from mistral_eqx.nn import DenseWeight
from mistral_eqx.quant import DYNAMIC_CODES, NF4_CODES, Layer, formats, quantize


SCHEMES = {
    "int8 rows": mx.Int8(),
    "int8 rows, zero": mx.Int8(zero_point=True),
    "int8 columns": mx.Int8(by="column"),
    "int8 columns, zero": mx.Int8(by="column", zero_point=True),
    "int8 blocks": mx.Int8(by=16),
    "int8 searched": mx.Int8(by=16, search=True),
    "int4": mx.RTN(group_size=16),
    "int3": mx.RTN(bits=3, group_size=16, zero_point=False),
    "nf4": mx.NF4(block_size=16),
    "double nf4": mx.NF4(double=True),
    "fp8 tensor": mx.FP8(by="tensor"),
    "fp8 rows": mx.FP8(),
    "fp8 blocks": mx.FP8(by=16),
    "Q4_1": mx.GGUF("Q4_1"),
    "Q8_0": mx.GGUF("Q8_0"),
    "MXFP4": mx.GGUF("MXFP4"),
}
# The largest error of a number, as a share of the largest of all: half a step, or half the widest gap between codes.
BOUNDS = {"int8": 0.5 / 127 * 1.01, "int4": 0.5 * 2 / 15, "int3": 0.5 / 3, "nf4": 0.16, "fp8": 1 / 16, "Q4_1": 0.08}
# A scale is within 1/128 of the largest one.
BOUNDS |= {"double nf4": 0.17}
BOUNDS |= {"Q8_0": 0.5 / 127 * 1.01, "MXFP4": 0.25}


@pytest.fixture
def weight(getkey):
    return np.asarray(jr.normal(getkey(), (4, 8, 2, 32)), np.float32)


def layer(**changes):
    return Layer("layer", 2, **changes)


@pytest.mark.parametrize("name", every_third(SCHEMES))
def test_a_weight_is_near_its_numbers_and_multiplies_as_its_dense_form(name, weight, getkey):
    found = SCHEMES[name].weight(weight, layer())
    dense = found.dense()
    assert dense.shape == weight.shape
    bound = next(bound for kind, bound in BOUNDS.items() if name.startswith(kind))
    assert np.abs(dense - weight).max() <= bound * np.abs(weight).max() * (1.3 if "searched" in name else 1)
    x = jr.normal(getkey(), (2, 3, 2, 32))
    product = found.contract(x, "a b", "c d")
    # Float32 sums of 64 products, with scales before or after the sum.
    assert relative_error(product, DenseWeight(dense).contract(x, "a b", "c d")) < 2e-6
    ids = jnp.asarray([[0, 3], [1, 1]])
    table = SCHEMES[name].weight(weight.reshape(32, 64), Layer("table", 1))
    np.testing.assert_array_equal(table.rows(ids), table.dense()[ids])
    assert table.row_count == 32


def test_absmax_and_zero_point_by_their_definition():
    numbers = np.array([[-1.0, 0.5, 0.25, 0.0], [0.0, 3.0, 1.0, 2.0]], np.float32)
    by_row = mx.Int8().weight(numbers, Layer("layer", 1))
    np.testing.assert_allclose(by_row.scale, [1 / 127, 3 / 127], rtol=1e-6)
    expected = np.round(numbers / np.array([[1 / 127], [3 / 127]], np.float32))
    np.testing.assert_array_equal(by_row.base.dense(), expected)
    shifted = mx.Int8(zero_point=True).weight(numbers, Layer("layer", 1))
    # From the least to the largest in 255 steps, 0 among the codes.
    np.testing.assert_allclose(shifted.scale, [1.5 / 255, 3 / 255], rtol=1e-6)
    np.testing.assert_array_equal(shifted.zero, [170 - 128, 0 - 128])
    assert np.abs(shifted.dense() - numbers).max() <= 1.5 / 255
    by_column = mx.Int8(by="column").weight(numbers, Layer("layer", 1))
    np.testing.assert_allclose(by_column.scale, np.abs(numbers).max(axis=0) / 127, rtol=1e-6)


@pytest.mark.slow
def test_zeros_have_a_scale():
    for scheme in SCHEMES.values():
        dense = scheme.weight(np.zeros((2, 64), np.float32), Layer("layer", 1)).dense()
        np.testing.assert_array_equal(dense, np.zeros((2, 64)))


SEARCHED = {
    "3 bits": (mx.RTN, {"bits": 3}),
    "4 bits, no zero": (mx.RTN, {"zero_point": False}),
    "int8 rows": (mx.Int8, {}),
    "int8 columns": (mx.Int8, {"by": "column", "zero_point": True}),
    "int8 blocks": (mx.Int8, {"by": 32}),
    "fp8 tensor": (mx.FP8, {"by": "tensor"}),
    "fp8 rows": (mx.FP8, {}),
    "fp8 blocks": (mx.FP8, {"by": 16}),
}


@pytest.mark.parametrize("name", SEARCHED)
def test_a_searched_range_has_less_error(name, getkey):
    kind, options = SEARCHED[name]
    # A few numbers are far from the others.
    numbers = np.asarray(jr.t(getkey(), 2.0, (16, 64)), np.float32)
    errors = []
    for search in (False, True):
        found = kind(**options, search=search).weight(numbers, Layer("layer", 1))
        # Of all numbers that share a scale, or of several such groups.
        axis = {"column": 0, "tensor": None}.get(options.get("by"), 1)
        errors.append(np.square(np.asarray(found.dense()) - numbers).sum(axis=axis))
    # Sums of 64 squares in float32.
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    # With 8 bits, rounding the others more finely gains less than the largest numbers lose.
    assert errors[1].sum() < errors[0].sum() or name in ("int8 rows", "int8 columns", "int8 blocks", "fp8 tensor")


def test_nf4_has_the_nearest_codes(getkey):
    numbers = np.asarray(jr.normal(getkey(), (8, 64)), np.float32)
    found = mx.NF4(block_size=32).weight(numbers, Layer("layer", 1)).dense()
    blocks = numbers.reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs((blocks / largest)[..., None] - NF4_CODES).argmin(axis=-1)
    np.testing.assert_array_equal(found, (NF4_CODES[nearest] * largest).reshape(8, 64))


def test_scales_of_nf4_are_quantized_in_a_row_of_all(getkey):
    """38 rows have 342 scales, of which 256 share a factor: those of the row 28 have two factors."""
    numbers = np.asarray(jr.normal(getkey(), (38, 576)), np.float32)
    plain, double = (scheme.weight(numbers, Layer("layer", 1)) for scheme in (mx.NF4(), mx.NF4(double=True)))
    assert (double.format, double.blocks.nbytes) == ("NF4D/576", 38 * (12 + 12 + 288))
    scale = np.asarray(plain.blocks)[..., :4].copy().view(np.float32).reshape(-1)
    shares = (scale - scale.mean()).astype(np.float64)
    factors = np.repeat([np.abs(part).max() for part in (shares[:256], shares[256:])], [256, len(scale) - 256])
    nearest = DYNAMIC_CODES[np.abs((shares / factors)[:, None] - DYNAMIC_CODES).argmin(axis=1)]
    expected = np.asarray(plain.dense()).reshape(-1, 64) / scale[:, None] * (nearest * factors + scale.mean())[:, None]
    # Float32's rounding of the mean and of the products.
    np.testing.assert_allclose(double.dense().reshape(-1, 64), expected, rtol=2e-6)


def test_a_row_in_double_quantization_is_not_cut(getkey):
    model = random_model(tiny(embed=64, hidden=128, head_dim=32, q_per_kv=2, layers=1, windows=(None,)), getkey())
    small, mesh = mx.quantize(model, mx.NF4(double=True)), mx.make_mesh("tp=2")
    with refused("o_proj", "kv_heads"):
        mx.shard(small, mesh, mx.HEADS)
    ids = jnp.arange(16).reshape(2, 8)
    logits = eqx.filter_jit(small)(ids)
    assert relative_error(logits, eqx.filter_jit(mx.dequantize(small))(ids)) < 1e-5
    split = mx.shard(small, mesh, mx.Strategy("vocab@tp"))
    assert relative_error(eqx.filter_jit(split)(ids), logits) < 1e-5


def test_activations_of_8_bits_are_whole_numbers(weight, getkey):
    found = mx.Int8(activations="int8").weight(weight, layer())
    x = np.asarray(jr.normal(getkey(), (2, 3, 2, 32)), np.float32)
    flat, codes = x.reshape(6, 64), np.asarray(found.base.base.dense()).reshape(32, 64).astype(np.int64)
    scale = np.abs(flat).max(axis=1, keepdims=True) / np.float32(127)
    rounded = np.rint(flat / scale).astype(np.int64)
    expected = (rounded @ codes.T) * scale.astype(np.float64) * np.asarray(found.base.scale).reshape(1, 32)
    assert relative_error(found.contract(jnp.asarray(x), "a b", "c d").reshape(6, 32), expected) < 1e-6
    assert (jax.grad(lambda x: found.contract(x, "a b", "c d").sum())(jnp.asarray(x)) != 0).all()


def test_activations_above_the_threshold_are_not_rounded(weight, getkey):
    found = mx.Int8(activations="int8", threshold=6.0).weight(weight, layer())
    x = np.array(jr.normal(getkey(), (1, 5, 2, 32)), np.float32)
    x[0, :, 1, 7] = 60.0
    product = found.contract(jnp.asarray(x), "a b", "c d")
    exact = found.base.contract(jnp.asarray(x), "a b", "c d")
    every = mx.Int8(activations="int8").weight(weight, layer()).contract(jnp.asarray(x), "a b", "c d")
    assert relative_error(product, exact) < 0.1 * relative_error(every, exact)
    x[...] = np.where(np.abs(x) < 1, 0, 100.0)
    large = jnp.asarray(x)
    assert relative_error(found.contract(large, "a b", "c d"), found.base.contract(large, "a b", "c d")) < 1e-6


WHOLE = {
    **{name: scheme for name, scheme in SCHEMES.items() if name in ("int8 rows, zero", "int8 columns, zero")},
    "w8a8": mx.Int8(activations="int8", threshold=1.0),
    "fp8 with activations": mx.FP8(activations="float8_e4m3"),
    "mixed": {"*.down_proj": mx.RTN(group_size=16), "blocks.*": mx.NF4(16), "embedding": mx.GGUF("Q8_0")},
}


@pytest.mark.parametrize("name", every_third(WHOLE))
def test_a_model_is_quantized_and_everything_works_on_it(name, getkey):
    model = random_model(tiny(embed=32, hidden=64, vocab=64, layers=1, windows=(None,)), getkey())
    done = []
    small = mx.quantize(model, WHOLE[name], progress=lambda *counts: done.append(counts))
    assert done == [(at, len(done)) for at in range(1, len(done) + 1)]
    assert len(done) == 7 + (name == "mixed")
    ids = jnp.arange(12).reshape(2, 6)
    logits = eqx.filter_jit(small)(ids)
    if "w8a8" not in name and "activations" not in name:
        assert relative_error(logits, eqx.filter_jit(mx.dequantize(small))(ids)) < 1e-5
    mesh = mx.make_mesh("tp=2")
    split = mx.shard(small, mesh, mx.HEADS)
    # Rounded activations: a sum in another order may fall on the other side of a half, one step of 254 in one of many.
    bound = 2e-2 if "w8a8" in name or "activations" in name else 1e-5
    assert relative_error(eqx.filter_jit(split)(ids), logits) < bound
    again = mx.quantize(mx.shard(model, mesh, mx.HEADS), WHOLE[name])
    assert_same_weights(again, split)
    if name == "mixed":
        options = {"max_new_tokens": 6, "eos_id": ()}
        found, expected = (mx.generate(one, [[1, 2, 3], [4]], **options).tokens for one in (split, small))
        np.testing.assert_array_equal(found, expected)
    tuned = mx.apply_lora(small, rank=2, alpha=4.0, key=getkey())
    np.testing.assert_array_equal(eqx.filter_jit(tuned)(ids), logits)


def test_blocks_across_dimensions_are_not_cut(getkey):
    # Small weights: large scores would make more of a rounding than a sum in another order does.
    config = tiny(embed=64, head_dim=32, q_per_kv=2, layers=1, windows=(None,))
    small = mx.quantize(mx.Mistral.init(config, key=getkey()), {"*.o_proj": mx.RTN(group_size=64)})
    mesh = mx.make_mesh("tp=2")
    with refused("o_proj", "across q_per_kv and head_dim", "head_dim@tp"):
        mx.shard(small, mesh, mx.HEAD_DIM)
    ids = jnp.arange(12).reshape(2, 6)
    split = mx.shard(small, mesh, mx.Strategy("kv_heads@tp hidden@tp"))
    assert relative_error(eqx.filter_jit(split)(ids), eqx.filter_jit(small)(ids)) < 1e-5


def test_formats_are_listed(getkey):
    model = random_model(tiny(embed=32, hidden=64), getkey())
    assert formats(model) == []
    assert formats(quantize(model, mx.NF4(16))) == ["NF4/16"]
    assert formats(quantize(model, mx.Int8())) == ["INT8"]


def test_recipes_that_do_not_fit_are_refused(getkey):
    model = random_model(tiny(embed=48, hidden=64), getkey())
    with refused("q_proj", "48 inputs", "64", "16"):
        mx.quantize(model, mx.NF4())
    with refused("'*.gate'", "q_proj"):
        mx.quantize(model, {"*.gate": mx.NF4()})
    with refused("'blocks.*'", "int8"):
        mx.quantize(model, {"blocks.*": "int8"})
    with refused("adapter", "merge"):
        mx.quantize(mx.apply_lora(model, rank=2, alpha=4.0, key=getkey()), mx.Int8())
    for make, words in (
        (lambda: mx.Int8(by="rows"), ("by", "'rows'")),
        (lambda: mx.Int8(threshold=6.0), ("threshold", "activations")),
        (lambda: mx.Int8(activations="int4"), ("activations", "int4")),
        (lambda: mx.RTN(bits=9), ("bits",)),
        (lambda: mx.RTN(group_size=12), ("group_size",)),
        (lambda: mx.NF4(block_size=7), ("block_size",)),
        (lambda: mx.NF4(32, double=True), ("block_size=32", "64")),
        (lambda: mx.FP8(by="column"), ("column",)),
        (lambda: mx.GGUF("IQ9"), ("IQ9", "Q8_0")),
    ):
        with refused(*words):
            make()


def test_merging_would_expand_a_quantized_weight(getkey):
    model = random_model(tiny(embed=32, hidden=64), getkey())
    tuned = mx.apply_lora(mx.quantize(model, mx.NF4(16)), rank=2, alpha=4.0, key=getkey())
    with refused("q_proj", "dequantize"):
        mx.merge_lora(tuned)
    expanded = mx.merge_lora(mx.dequantize(tuned))
    ids = jnp.arange(12).reshape(2, 6)
    assert relative_error(eqx.filter_jit(expanded)(ids), eqx.filter_jit(tuned)(ids)) < 1e-5
