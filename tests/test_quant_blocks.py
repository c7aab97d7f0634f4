"""Weights in the blocks of GGUF, compared with the package gguf and with the dequantized model."""

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.cases import every_third
from fixtures.checkpoint import random_model, tiny, write_gguf
from fixtures.generation import refused
from fixtures.model import product_bound, relative_error

import mistral_eqx as mx
from mistral_eqx import train
from mistral_eqx.checkpoint.reader import CHUNK_BYTES
from mistral_eqx.nn import DenseWeight
from mistral_eqx.nn.kernels import native
from mistral_eqx.quant import FORMATS, BlockWeight, formats, merged_sizes, to_panels


Kind = gguf.GGMLQuantizationType
# XLA flushes the smallest numbers of MXFP4 to zero; tests/test_native_formats.py has it with larger ones.
WITH_KERNELS = [name for name in FORMATS if name not in ("MXFP4", "F32")]


def random_blocks(format, count, seed=0):
    """Any bytes are blocks; those of a float16 that is not finite are replaced."""
    raw = np.random.default_rng(seed).integers(0, 256, (count, format.nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        numbers = gguf.quants.dequantize(raw, Kind[format.name])
    return raw[np.isfinite(numbers).all(axis=1) & (np.abs(numbers) < 1e4).all(axis=1)]


@pytest.mark.parametrize("name", every_third(FORMATS))
def test_numbers_are_those_of_gguf_bit_for_bit(name):
    format = FORMATS[name]
    assert gguf.GGML_QUANT_SIZES[Kind[name]] == (format.size, format.nbytes)
    raw = random_blocks(format, 2000)
    assert len(raw) > 500
    expected = gguf.quants.dequantize(raw, Kind[name]).astype(np.float32)
    for dequantize in (format.dequantize, jax.jit(format.dequantize)):
        found = np.asarray(dequantize(jnp.asarray(raw)))
        # XLA takes the scales of MXFP4 that are too small for all bits of a float for 0.
        small = (name == "MXFP4") & (expected != 0) & (np.abs(expected) < 12 * np.finfo(np.float32).tiny)
        assert small.mean() < 0.05
        np.testing.assert_array_equal(np.where(small, 0, found), np.where(small, 0, expected))


@pytest.mark.parametrize("name", every_third(["Q4_1", "Q4_K", "F16"]))
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
    # Float32 sums of at most 1536 terms in another order: 6e-8 times the root of their number.
    assert relative_error(found, DenseWeight(dense).contract(x, in_dims, out_dims)) < 2.4e-6
    if len(out) == 1:
        ids = jnp.asarray([[0, 2], [1, 0]])
        np.testing.assert_array_equal(weight.rows(ids), dense[ids])
        assert weight.row_count == out[0]


def test_blocks_that_fit_no_axes():
    assert merged_sizes((3, 5), 32) is None
    assert merged_sizes((8, 32), 32) == ()
    assert merged_sizes((3, 8, 4), 32) == (8, 4)
    assert merged_sizes((2, 4, 4), 32) == (2, 4, 4)


needs_kernels = pytest.mark.skipif(native.instructions() is None, reason="The C++ kernels were not built.")


def weight_in_panels(name, rows, inputs):
    """A weight as the kernels read it, and its numbers."""
    format = FORMATS[name]
    needed = rows * inputs // format.size
    raw = random_blocks(format, 8 * needed)[:needed]
    panels = to_panels(raw.reshape(rows, -1, format.nbytes), format)
    expected = gguf.quants.dequantize(raw, Kind[name]).reshape(rows, inputs)
    return BlockWeight(jnp.asarray(panels), name, 1, panel=native.PANEL), expected


@pytest.mark.parametrize("name", every_third(WITH_KERNELS))
def test_panels_hold_the_same_numbers(name):
    weight, expected = weight_in_panels(name, 48, 512)
    np.testing.assert_array_equal(weight.dense(), expected.astype(np.float32))
    ids = jnp.asarray([[0, 17, 47]])
    np.testing.assert_array_equal(weight.rows(ids), weight.dense()[ids])
    assert weight.row_count == 48


@needs_kernels
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_products_of_kernels_are_those_of_the_dequantized_weight(name):
    weight, numbers = weight_in_panels(name, 48, 512)
    numbers = numbers.astype(np.float64)
    # Numbers of rows that the kernel takes at once, and those that are left; from 16 on it makes tiles of them.
    for rows in (1, 2, 3, 4, 7, 8, 13, 16, 21):
        x = np.random.default_rng(rows).normal(size=(1, rows, 512)).astype(np.float32)
        found = np.asarray(jax.jit(lambda x: weight.contract(x, "a", "b"))(jnp.asarray(x)))
        bound = product_bound(x[0], numbers, name not in ("BF16", "F16"))
        assert (np.abs(found[0] - x[0] @ numbers.T) <= bound).all()


@needs_kernels
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_a_row_gives_what_it_gives_alone(name):
    weight, _ = weight_in_panels(name, 48, 512)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40, 512)).astype(np.float32))
    few = weight.contract(x[:, :15], "a", "b")
    for row in (0, 3, 14):
        np.testing.assert_array_equal(weight.contract(x[:, row : row + 1], "a", "b")[0, 0], few[0, row])
    # From 16 rows on, a product has another order.
    many = weight.contract(x, "a", "b")
    np.testing.assert_array_equal(weight.contract(x[:, 3:22], "a", "b"), many[:, 3:22])


@needs_kernels
@pytest.mark.parametrize("rows", [3, 20])
def test_several_weights_in_one_call_give_what_each_gives_alone(rows):
    weights = [weight_in_panels(name, outputs, 512)[0] for name, outputs in (("Q4_1", 48), ("Q6_K", 16), ("BF16", 32))]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, rows, 512)).astype(np.float32))
    together = jax.jit(lambda x: BlockWeight.contract_together(weights, x, "a", ["b", "b", "b"]))
    assert together.lower(x).as_text().count("stablehlo.custom_call @mistral_eqx_linear") == 1
    for weight, found in zip(weights, together(x), strict=True):
        np.testing.assert_array_equal(found, weight.contract(x, "a", "b"))


@needs_kernels
@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_an_odd_number_of_inputs(name):
    weight, numbers = weight_in_panels(name, 16, 33)
    x = np.random.default_rng(0).normal(size=(1, 3, 33)).astype(np.float32)
    assert relative_error(weight.contract(jnp.asarray(x), "a", "b"), x @ numbers.astype(np.float64).T) < 1e-6


@needs_kernels
@pytest.mark.parametrize("name", WITH_KERNELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_in_its_row(name, bad):
    weight, _ = weight_in_panels(name, 16, 512)
    x = np.ones((1, 3, 512), np.float32)
    x[0, 1, 77] = bad
    found = np.asarray(weight.contract(jnp.asarray(x), "a", "b"))[0]
    assert np.isfinite(found[[0, 2]]).all()
    assert not np.isfinite(found[1]).any()


@needs_kernels
def test_gradients_are_those_of_the_dequantized_weight(getkey):
    weight, numbers = weight_in_panels("Q4_K", 48, 512)
    x = jr.normal(getkey(), (2, 3, 512))
    found = jax.grad(lambda x: jnp.sum(weight.contract(x, "a", "b")))(x)
    np.testing.assert_allclose(found, jnp.broadcast_to(numbers.sum(axis=0), x.shape), rtol=1e-4, atol=1e-3)


@needs_kernels
def test_shapes_that_do_not_fit_are_refused_by_the_library():
    x, panels = jnp.zeros((2, 64)), jnp.zeros((3, 2, 16 * 20), jnp.uint8)
    (y,) = native.linear(x, [panels], ["Q4_1"])
    assert y.shape == (2, 48)
    for bad, weight, format in ((x[:, :32], panels, "Q4_1"), (x, panels, "Q8_0"), (x, panels[..., :-1], "Q4_1")):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
            jax.block_until_ready(native.linear(bad, [weight], [format]))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such format"):
        jax.block_until_ready(native.linear(x, [panels], ["Q9_9"]))


@pytest.mark.parametrize("kind", [pytest.param("Q4_0", marks=pytest.mark.slow), "Q8_0"])
def test_a_file_is_loaded_as_it_is(kind, getkey, tmp_path, without_kernels):
    model = random_model(tiny(head_dim=32), getkey())
    path = write_gguf(tmp_path / "model.gguf", model, Kind[kind])
    packed, dense = mx.load(path), mx.load(path, dtype="float32")
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
    for split in (mx.load(path, mesh=mesh, strategy=mx.HEADS), mx.shard(packed, mesh, mx.HEADS)):
        assert relative_error(eqx.filter_jit(split)(ids), logits) < 1e-5


@needs_kernels
@pytest.mark.parametrize("strategy", [pytest.param(mx.HEADS, marks=pytest.mark.slow), mx.SEQUENCE_PARALLEL])
def test_a_mesh_gives_what_one_device_gives_with_kernels(strategy, getkey, tmp_path):
    model = random_model(tiny(head_dim=32, hidden=128), getkey())
    path = write_gguf(tmp_path / "model.gguf", model, Kind.Q8_0)
    ids = jnp.arange(12).reshape(2, 6)
    one = mx.load(path)
    assert one.blocks[0].attention.q_proj.weight.panel == native.PANEL
    split = mx.load(path, mesh=mx.make_mesh("tp=2"), strategy=strategy)
    logits = eqx.filter_jit(one)(ids)
    # Of 14 products on a path each is within 4e-5, and sums over devices have another order.
    assert relative_error(eqx.filter_jit(split)(ids), logits) < 14 * 4e-5
    prompts = [[1, 2, 3], [4]]
    found, expected = (mx.generate(m, prompts, max_new_tokens=8, eos_id=()).tokens for m in (split, one))
    np.testing.assert_array_equal(found, expected)


def test_blocks_are_checked_on_request(getkey, tmp_path):
    model = random_model(tiny(head_dim=32), getkey())
    path = write_gguf(tmp_path / "model.gguf", model, Kind.Q8_0)
    mx.load(path, check=True)
    (tensor,) = (one for one in gguf.GGUFReader(path).tensors if one.name == "blk.1.ffn_up.weight")
    with open(path, "r+b") as file:
        file.seek(tensor.data_offset)
        # The scale of the first block, in float16.
        file.write(np.float16(np.nan).tobytes())
    with refused("blk.1.ffn_up.weight"):
        mx.load(path, check=True)


def test_blocks_are_not_cut(getkey, tmp_path):
    model = random_model(tiny(head_dim=32, vocab=64), getkey())
    path = write_gguf(tmp_path / "model.gguf", model, Kind.Q8_0)
    mesh = mx.make_mesh("tp=2")
    with refused("blocks.0.attention.o_proj", "1 unit along head_dim", "2 devices", "float32"):
        mx.load(path, mesh=mesh, strategy=mx.HEAD_DIM)
    with refused("o_proj", "1 unit along head_dim"):
        mx.shard(mx.load(path), mesh, mx.HEAD_DIM)


@needs_kernels
@pytest.mark.long
def test_scores_and_steps_are_those_of_the_expanded_model(getkey, tmp_path):
    """The head's rows are taken in chunks of whole panels."""
    model = random_model(tiny(vocab=2080), getkey())
    path = write_gguf(tmp_path / "model.gguf", model, Kind.Q8_0)
    packed, dense = mx.load(path), mx.load(path, dtype="float32")
    assert packed.embedding.weight.panel == native.PANEL
    texts = [list(range(5, 25)), [3, 2000, 4]]
    found, expected = (mx.score(m, texts).log_probs for m in (packed, dense))
    # A path has 14 products, each within 4e-5, and logits of about 50.
    np.testing.assert_allclose(found, expected, atol=14 * 4e-5 * 50)
    batch = train.one_a_row([train.causal(text) for text in texts], 20)
    optimizer = train.adamw(1e-2)
    losses = []
    for base in (packed, dense):
        tuned = mx.apply_lora(base, rank=2, alpha=4.0, key=jr.key(3))
        state, step = train.TrainState.init(tuned, optimizer), train.make_step(optimizer, compute_dtype=None)
        for _ in range(3):
            state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@needs_kernels
@pytest.mark.long
def test_smollm2_says_what_it_says_in_float32(smollm2_path):
    packed, dense = (mx.load(smollm2_path, dtype=dtype) for dtype in (None, "float32"))
    assert formats(packed) == ["Q4_1", "Q8_0"]
    ids = mx.load_tokenizer(smollm2_path).encode("The capital of France is a city that")
    logits = eqx.filter_jit(dense)(jnp.asarray([ids]))
    # 210 products after each other, each within 4e-5, whose errors are of random signs.
    assert relative_error(eqx.filter_jit(packed)(jnp.asarray([ids])), logits) < 4e-5 * 210**0.5
    found, expected = (mx.generate(model, [ids], max_new_tokens=16).tokens for model in (packed, dense))
    np.testing.assert_array_equal(found, expected)


MEMORY = """
import sys

import jax.numpy as jnp

import mistral_eqx as mx


def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


load = mx.load  # imports the rest
jnp.zeros(1).block_until_ready()
before = peak()
model = load(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="The peak is that of /proc.")
def test_loading_takes_little_more_than_the_file(smollm2_path):
    # What numpy and JAX hold, and not what the allocator of C keeps for each thread.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    command = [sys.executable, "-c", MEMORY, smollm2_path]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | allocator)
    # Beside the weights, a chunk that is read and its panels.
    assert int(ran.stdout) < 1.1 * smollm2_path.stat().st_size + 2 * CHUNK_BYTES


@pytest.mark.slow
def test_the_example(smollm2_path, capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples/quantized.py"))["main"](str(smollm2_path))
    floats, blocks = capsys.readouterr().out.splitlines()
    assert floats.startswith("float32, 538 MB: ' Paris")
    assert re.match(r"Q4_1 and Q8_0, \d\d MB: ' Paris", blocks)
