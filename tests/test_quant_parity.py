"""Quantized folders and codes, compared live with bitsandbytes, compressed-tensors and transformers on the CPU."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from fixtures.checkpoint import assert_same_weights, random_model, tiny
from fixtures.equality import precision
from fixtures.model import relative_error

import mistral_eqx as mx
from mistral_eqx.quant import DYNAMIC_CODES, Layer, block_format, formats
from mistral_eqx.quant.floats import double_nf4_scales


pytestmark = pytest.mark.parity

# So many rows that no kernel rounds their activations.
IDS = np.arange(16).reshape(2, 8)


@pytest.fixture
def model(getkey):
    return random_model(tiny(embed=64, hidden=128, vocab=64, q_per_kv=2), getkey())


def their_logits(folder, dtype=None, **options):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).to(dtype)
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.to(dtype or torch.float32).numpy()


def float64_logits(model):
    """The logits of the numbers that quantized weights stand for. transformers' norms and rotation stay in float32."""
    with precision(jnp.float64):
        model = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf, mx.dequantize(model)
        )
        return np.asarray(eqx.filter_jit(model)(jnp.asarray(IDS)))


def test_nf4_codes_are_those_of_bitsandbytes(getkey):
    torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    numbers = np.asarray(jr.normal(getkey(), (256, 1024)), np.float32)
    packed, state = bnb.functional.quantize_4bit(torch.tensor(numbers), blocksize=64, quant_type="nf4")
    blocks = np.asarray(mx.NF4(64).weight(numbers, Layer("layer", 1)).blocks).reshape(-1, 36)
    np.testing.assert_array_equal(blocks[:, 4:].reshape(-1, 1), packed.numpy())
    np.testing.assert_array_equal(blocks[:, :4].copy().view(np.float32)[:, 0], state.absmax.numpy())
    theirs = bnb.functional.dequantize_4bit(packed, state).numpy()
    ours = np.asarray(block_format("NF4/64").dequantize(jnp.asarray(blocks))).reshape(numbers.shape)
    np.testing.assert_array_equal(ours, theirs)


def test_double_quantization_is_that_of_bitsandbytes(getkey):
    torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    numbers = np.asarray(jr.normal(getkey(), (300, 576)), np.float32)
    packed, state = bnb.functional.quantize_4bit(
        torch.tensor(numbers), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    # Theirs are computed in float32, in another way with each instruction set.
    np.testing.assert_allclose(DYNAMIC_CODES, state.state2.code.numpy(), rtol=3e-7)
    largest = np.abs(numbers.reshape(-1, 64)).max(axis=1)
    offset = np.float32(state.offset)
    scales, factors = double_nf4_scales(largest, offset)
    np.testing.assert_array_equal(scales, state.absmax.numpy())
    np.testing.assert_array_equal(factors, state.state2.absmax.numpy())
    # Ours is the mean in float64, theirs in float32.
    weight = mx.NF4(double=True).weight(numbers, Layer("layer", 1))
    rows = np.asarray(weight.blocks).reshape(300, -1)
    np.testing.assert_allclose(rows[:, :4].copy().view(np.float32)[:, 0], offset, rtol=1e-6)
    assert (rows[:, 13:22].reshape(-1) != state.absmax.numpy()).mean() < 1e-3
    np.testing.assert_array_equal(rows[:, 24:].reshape(-1, 1), packed.numpy())
    theirs = bnb.functional.dequantize_4bit(packed, state).numpy()
    assert relative_error(weight.dense(), theirs) < 1e-4


def test_int8_codes_are_those_of_bitsandbytes(getkey):
    torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    numbers = np.asarray(jr.normal(getkey(), (64, 256)), np.float16).astype(np.float32)
    codes, largest, _ = bnb.functional.int8_vectorwise_quant(torch.tensor(numbers, dtype=torch.float16))
    found = mx.Int8().weight(numbers, Layer("layer", 1))
    np.testing.assert_allclose(found.scale * 127, largest.numpy(), rtol=1e-6)
    # Theirs are rounded from 16-bit numbers: a code may differ where a number lies in the middle.
    differs = np.asarray(found.base.dense()) != codes.numpy()
    assert differs.mean() < 1e-3


@pytest.fixture
def products_in_float32(monkeypatch):
    """On a CPU with instructions for bfloat16, bitsandbytes multiplies in bfloat16, whatever precision is asked for."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False, raising=False)


@pytest.mark.parametrize("double", [False, True])
def test_what_transformers_quantizes_with_bitsandbytes_is_loaded(double, model, tmp_path, products_in_float32):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    mx.save(model, tmp_path / "floats")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "floats", quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "nf4")
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    for dtype in (None, "float32"):
        ours = mx.load(tmp_path / "nf4", dtype=dtype)
        assert relative_error(eqx.filter_jit(ours)(jnp.asarray(IDS)), expected) < 1e-5
    assert set(formats(mx.load(tmp_path / "nf4"))) == ({"NF4D/64", "NF4D/128"} if double else {"NF4/64"})


SCHEMES = {
    "nf4": (mx.NF4(64), "bitsandbytes"),
    "int4": (mx.RTN(group_size=32, zero_point=False), "compressed_tensors"),
    "int8 in blocks": (mx.Int8(by=32), "compressed_tensors"),
    "int8": (mx.Int8(), "compressed_tensors"),
    "fp8": (mx.FP8(), "compressed_tensors"),
    "fp8, one scale": (mx.FP8(by="tensor"), "compressed_tensors"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_reads_what_is_saved(name, model, tmp_path, request):
    """In float64 where theirs can, since float32's own errors are as large as the tolerance for some random models."""
    scheme, needed = SCHEMES[name]
    torch = pytest.importorskip("torch")
    pytest.importorskip(needed)
    small = mx.quantize(model, scheme)
    mx.save(small, tmp_path / "small")
    logits = eqx.filter_jit(small)(jnp.asarray(IDS))
    if needed == "bitsandbytes":
        request.getfixturevalue("products_in_float32")
        assert relative_error(their_logits(tmp_path / "small", device_map="cpu"), logits) < 1e-5
    else:
        theirs = their_logits(tmp_path / "small", torch.float64, device_map="cpu")
        assert relative_error(theirs, float64_logits(small)) < 1e-5
    again = mx.load(tmp_path / "small")
    assert relative_error(eqx.filter_jit(again)(jnp.asarray(IDS)), logits) < 1e-6


@pytest.mark.parametrize("kind", [mx.GPTQ, mx.AWQ])
def test_transformers_reads_what_was_calibrated(kind, model, tmp_path):
    """Without `act_order`, which this release of compressed-tensors no longer reads."""
    pytest.importorskip("compressed_tensors")
    calibration = np.random.default_rng(0).integers(0, 64, (4, 32))
    small = mx.quantize(model, kind(group_size=32, zero_point=False), calibration=calibration)
    mx.save(small, tmp_path / "small")
    theirs = their_logits(tmp_path / "small", pytest.importorskip("torch").float64, device_map="cpu")
    assert relative_error(theirs, float64_logits(small)) < 1e-5


@pytest.mark.parametrize(
    ("bits", "strategy"), [(4, "group"), (4, "channel"), (8, "group"), (8, "channel"), (3, "group")]
)
def test_what_compressed_tensors_packs_with_zero_points_is_loaded(bits, strategy, model, tmp_path):
    """Each linear layer compressed by the package, and compared with its own decompression."""
    torch, package = pytest.importorskip("torch"), pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from safetensors.torch import load_file, save_file

    arguments = {"num_bits": bits, "symmetric": False, "strategy": strategy, "type": "int"}
    arguments |= {"group_size": 32} if strategy == "group" else {}
    weights = package.quantization.QuantizationArgs(**arguments)
    scheme = package.quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    mx.save(model, tmp_path / "floats")
    written, expected = {}, {}
    for name, numbers in load_file(tmp_path / "floats/model.safetensors").items():
        expected[name] = written[name] = numbers
        if not name.endswith("_proj.weight"):
            continue
        groups = numbers.reshape(len(numbers), -1, 32 if strategy == "group" else numbers.shape[1])
        low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        zero = (torch.round(-low / scale) - 2 ** (bits - 1)).to(torch.int8)
        parts = {"weight": numbers, "weight_scale": scale, "weight_zero_point": zero}
        packed = PackedQuantizationCompressor.compress(parts, scheme)
        stem = name.removesuffix("weight")
        del written[name]
        written |= {stem + end: tensor.contiguous() for end, tensor in packed.items()}
        expected[name] = PackedQuantizationCompressor.decompress(packed, scheme)["weight"].contiguous()
    save_file(expected, tmp_path / "floats/model.safetensors", {"format": "pt"})
    folder = tmp_path / "small"
    folder.mkdir()
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((tmp_path / "floats/config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    kept = mx.load(folder)
    assert all(name.startswith(f"INT{bits}/") for name in formats(kept))
    assert_same_weights(mx.dequantize(kept), mx.load(tmp_path / "floats"))


@pytest.mark.filterwarnings("ignore:You passed .quantization_config")
@pytest.mark.parametrize("bits", [3, 4])
def test_transformers_reads_zero_points_if_it_dequantizes(bits, model, tmp_path):
    """Without, this release expects them in another shape."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    small = mx.quantize(model, mx.RTN(bits, group_size=32))
    mx.save(small, tmp_path / "small")
    config = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = their_logits(tmp_path / "small", torch.float64, device_map="cpu", quantization_config=config)
    assert relative_error(theirs, float64_logits(small)) < 1e-5
    assert_same_weights(mx.dequantize(mx.load(tmp_path / "small")), mx.dequantize(small))


def test_zero_points_are_those_of_compressed_tensors(model, tmp_path):
    torch, package = pytest.importorskip("torch"), pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from safetensors.torch import load_file

    small = mx.quantize(model, mx.RTN(group_size=32))
    mx.save(small, tmp_path / "small")
    stem = "model.layers.1.mlp.up_proj."
    tensors = load_file(tmp_path / "small/model.safetensors")
    parts = {name.removeprefix(stem): tensor for name, tensor in tensors.items() if name.startswith(stem)}
    weights = json.loads((tmp_path / "small/config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    scheme = package.quantization.QuantizationScheme(
        targets=["Linear"], weights=package.quantization.QuantizationArgs(**weights["weights"])
    )
    theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"].to(torch.float32).numpy()
    np.testing.assert_allclose(theirs, small.blocks[1].feed_forward.up_proj.weight.dense(), rtol=1e-6)
    assert_same_weights(mx.dequantize(mx.load(tmp_path / "small")), mx.dequantize(small))
