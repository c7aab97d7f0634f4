"""Weights in the blocks of GGUF, compared with the package gguf and with the dequantized model."""

import math

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.checkpoint import random_model, tiny, write_gguf
from fixtures.model import relative_error

import mistral_eqx as mx
from mistral_eqx.nn import DenseWeight
from mistral_eqx.quant import FORMATS, BlockWeight, merged_sizes


Kind = gguf.GGMLQuantizationType


def random_blocks(format, count, seed=0):
    """Any bytes are blocks; those of a float16 that is not finite are replaced."""
    raw = np.random.default_rng(seed).integers(0, 256, (count, format.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        numbers = gguf.quants.dequantize(raw, Kind[format.name])
    return raw[np.isfinite(numbers).all(axis=1) & (np.abs(numbers) < 1e4).all(axis=1)]


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_those_of_gguf_bit_for_bit(name):
    format = FORMATS[name]
    assert gguf.GGML_QUANT_SIZES[Kind[name]] == (format.size, format.nbytes)
    raw = random_blocks(format, 2000)
    assert len(raw) > 500
    expected = gguf.quants.dequantize(raw, Kind[name]).astype(np.float32)
    for dequantize in (format.dequantize, jax.jit(format.dequantize)):
        found = np.asarray(dequantize(jnp.asarray(raw)))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "F16"])
@pytest.mark.parametrize(
    ("out", "inputs"), [((6,), (2, 3, 256)), ((4,), (4, 2, 128)), ((2, 3, 4), (512,)), ((3,), (4, 4, 16))]
)
def test_a_product_is_that_of_the_dequantized_weight(name, out, inputs, getkey):
    format = FORMATS[name]
    merged = merged_sizes(inputs, format.size)
    whole = inputs[: len(inputs) - max(len(merged), 1)]
    needed = math.prod(out) * math.prod(inputs) // format.size
    raw = random_blocks(format, 4 * needed)[:needed]
    weight = BlockWeight(jnp.asarray(raw.reshape(*out, *whole, -1, format.nbytes)), name, len(out), merged)
    dense = weight.dense()
    assert dense.shape == (*out, *inputs)
    expected = gguf.quants.dequantize(raw, Kind[name]).reshape(dense.shape)
    np.testing.assert_array_equal(dense, expected.astype(np.float32))
    out_dims, in_dims = " ".join("xyz"[: len(out)]), " ".join("abc"[: len(inputs)])
    assert len(weight.dims(in_dims, out_dims)["blocks"].split()) == weight.blocks.ndim
    x = jr.normal(getkey(), (2, 5, *inputs))
    found = weight.contract(x, in_dims, out_dims)
    assert relative_error(found, DenseWeight(dense).contract(x, in_dims, out_dims)) < 1e-6
    if len(out) == 1:
        ids = jnp.asarray([[0, 2], [1, 0]])
        np.testing.assert_array_equal(weight.rows(ids), dense[ids])
        assert weight.row_count == out[0]


def test_blocks_that_fit_no_axes():
    assert merged_sizes((3, 5), 32) is None
    assert merged_sizes((8, 32), 32) == ()
    assert merged_sizes((3, 8, 4), 32) == (8, 4)
    assert merged_sizes((2, 4, 4), 32) == (2, 4, 4)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_file_is_loaded_as_it_is(kind, getkey, tmp_path):
    model = random_model(tiny(head_dim=32), getkey())
    path = write_gguf(tmp_path / "model.gguf", model, Kind[kind])
    packed, dense = mx.load(path, dtype="stored"), mx.load(path)
    for name, layer in mx.lora.adaptable_layers(packed).items():
        assert layer.weight.format == kind, name
    ids = jnp.arange(12).reshape(2, 6)
    logits = eqx.filter_jit(dense)(ids)
    np.testing.assert_array_equal(eqx.filter_jit(packed)(ids), logits)
    options = {"max_new_tokens": 8, "eos_id": ()}
    prompts = [[1, 2, 3], [4]]
    assert (mx.generate(packed, prompts, **options).tokens == mx.generate(dense, prompts, **options).tokens).all()
    tuned = mx.apply_lora(packed, rank=2, alpha=4.0, key=getkey())
    np.testing.assert_array_equal(eqx.filter_jit(tuned)(ids), logits)
    mesh = mx.make_mesh("tp=2")
    for split in (mx.load(path, dtype="stored", mesh=mesh, strategy=mx.HEADS), mx.shard(packed, mesh, mx.HEADS)):
        assert relative_error(eqx.filter_jit(split)(ids), logits) < 1e-5
