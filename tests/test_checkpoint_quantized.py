"""Quantized folders as other tools publish them, compared with folders that hold the numbers they stand for."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import quantized
from fixtures.cases import every_third
from fixtures.checkpoint import assert_same_weights, random_model, tiny
from fixtures.generation import refused
from fixtures.model import relative_error
from safetensors.numpy import save_file

import mistral_eqx as mx
from mistral_eqx.checkpoint.safetensors import read_header
from mistral_eqx.quant import DYNAMIC_CODES, formats


FORMS = {
    "gptq 4 bits": (quantized.gptq(4, 32), "INT4/32"),
    "gptq 3 bits": (quantized.gptq(3, 32, v2=True), "INT3/32"),
    "gptq 8 bits, sorted": (quantized.gptq(8, 16, act_order=True), "INT8/16"),
    "awq": (quantized.awq(16), "INT4/16"),
    "nf4": (quantized.nf4(16), "NF4/16"),
    "nf4, double": (quantized.nf4(32, double=True), "NF4/32"),
    "int8": (quantized.bnb_int8(), "INT8"),
    "fp8": (quantized.fp8(), "FP8"),
    "fp8 in blocks": (quantized.fp8((16, 32)), "FP8/32"),
}


@pytest.fixture
def config():
    return tiny(embed=32, hidden=64, head_dim=32, vocab=64, layers=1, windows=(None,))


@pytest.mark.parametrize("form", every_third(FORMS))
def test_a_published_folder_has_the_numbers_it_stands_for(form, config, getkey, tmp_path, without_kernels):
    (pack, settings), format = FORMS[form]
    folder, plain = quantized.publish(tmp_path / "model", random_model(config, getkey()), pack, settings)
    expected = mx.load(plain, dtype="float32")
    assert_same_weights(mx.load(folder, dtype="float32"), expected)
    kept = mx.load(folder)
    assert formats(kept) == [format]
    ids = jnp.arange(16).reshape(2, 8)
    logits = eqx.filter_jit(expected)(ids)
    # The same products, scaled before the sum or after it: float32's rounding through two layers.
    assert relative_error(eqx.filter_jit(kept)(ids), logits) < 1e-5
    assert_same_weights(mx.dequantize(kept), expected)
    mesh = mx.make_mesh("tp=2")
    if "sorted" in form:
        with refused("o_proj", "kv_heads and q_per_kv and head_dim", "float32"):
            mx.load(folder, mesh=mesh, strategy=mx.HEADS)
        return
    for split in (mx.load(folder, mesh=mesh, strategy=mx.HEADS), mx.shard(kept, mesh, mx.HEADS)):
        assert relative_error(eqx.filter_jit(split)(ids), logits) < 1e-5


@pytest.mark.long
def test_double_quantization_stays_as_it_is(getkey, tmp_path):
    config = tiny(embed=64, hidden=1152, head_dim=32, q_per_kv=2, vocab=64, layers=1, windows=(None,))
    pack, settings = quantized.nf4(64, double=True, share=256, table=DYNAMIC_CODES)
    folder, plain = quantized.publish(tmp_path / "model", random_model(config, getkey()), pack, settings)
    expected, kept = mx.load(plain, dtype="float32"), mx.load(folder)
    # `down_proj` has rows of 18 scales.
    assert set(formats(kept)) == {"NF4D/64", "NF4D/128", "NF4D/1152"}
    found, numbers = (jax.tree.leaves(eqx.filter(one, eqx.is_array)) for one in (mx.dequantize(kept), expected))
    for one, other in zip(found, numbers, strict=True):
        # A scale is a product and a sum, which may be rounded once or twice.
        np.testing.assert_allclose(one, other, rtol=1e-6)
    ids = jnp.arange(16).reshape(2, 8)
    logits = eqx.filter_jit(expected)(ids)
    assert relative_error(eqx.filter_jit(kept)(ids), logits) < 1e-5
    split = mx.load(folder, mesh=mx.make_mesh("tp=2"), strategy=mx.HEADS)
    assert set(formats(split)) == {"NF4D/64", "NF4/64"}
    assert relative_error(eqx.filter_jit(split)(ids), logits) < 1e-5
    mx.save(kept, tmp_path / "again")
    assert_same_weights(mx.load(tmp_path / "again", dtype="float32"), mx.dequantize(kept))


def changed(folder, **settings):
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"] |= settings
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "quip"}, ("'quip'", "gptq", "awq")),
        ({"bits": 5}, ("bits", "5")),
        ({"bits": 8}, ("_proj", "fetch the checkpoint again")),
        ({"group_size": 0}, ("group_size",)),
        ({"group_size": 24}, ("groups of 24",)),
        ({"checkpoint_format": "marlin"}, ("checkpoint_format", "marlin")),
    ],
)
def test_a_config_that_does_not_fit_is_refused(settings, words, config, getkey, tmp_path):
    pack, own = quantized.gptq(4, 32)
    folder, _ = quantized.publish(tmp_path / "model", random_model(config, getkey()), pack, own)
    changed(folder, **settings)
    with refused(*words):
        mx.load(folder)


def test_integers_without_a_quantization_are_refused(config, getkey, tmp_path):
    pack, own = quantized.gptq(4, 32)
    folder, _ = quantized.publish(tmp_path / "model", random_model(config, getkey()), pack, own)
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    with refused("I32", "not supported"):
        mx.load(folder)


def test_a_folder_is_converted_to_floats(config, getkey, tmp_path):
    pack, own = quantized.nf4(16)
    folder, plain = quantized.publish(tmp_path / "model", random_model(config, getkey()), pack, own)
    mx.convert(folder, tmp_path / "floats", format="hf", dtype="float32")
    assert_same_weights(mx.load(tmp_path / "floats"), mx.load(plain))


def test_only_a_shard_of_a_file_is_read_by_rows(config, getkey, tmp_path):
    """The outputs of a weight may be in the columns of its file."""
    pack, own = quantized.awq(16)
    folder, plain = quantized.publish(tmp_path / "model", random_model(config, getkey()), pack, own)
    tensor = mx.checkpoint.open_checkpoint(folder).tensors["model.layers.0.mlp.up_proj.weight"]
    whole = mx.checkpoint.open_checkpoint(plain).tensors["model.layers.0.mlp.up_proj.weight"][...]
    np.testing.assert_array_equal(tensor.rows(3, 13), whole[3:13])
    np.testing.assert_array_equal(tensor.rows(5, 6, np.array([1, 7])), whole[5:6, [1, 7]])


SAVED = {
    "nf4": mx.NF4(16),
    "int4": mx.RTN(group_size=16),
    "int4, sorted": None,
    "int8 blocks": mx.Int8(by=16),
    "int8 rows": mx.Int8(),
    "fp8 rows": mx.FP8(),
    "fp8 tensor": mx.FP8(by="tensor"),
}


def assert_same(first, second):
    """Checks that two models have the same arrays, in weights of the same kinds."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_is_loaded(name, config, getkey, tmp_path):
    model = random_model(config, getkey())
    if SAVED[name] is None:
        folder, _ = quantized.publish(tmp_path / "model", model, *quantized.gptq(4, 16, act_order=True))
        small = mx.load(folder)
    else:
        small = mx.quantize(model, SAVED[name])
    mx.save(small, tmp_path / "small", max_shard_size="20KB")
    assert_same(mx.load(tmp_path / "small"), small)
    assert_same_weights(mx.load(tmp_path / "small", dtype="float32"), mx.dequantize(small))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (mx.Int8(by="column"), ("q_proj", "column", "dequantize")),
        (mx.Int8(zero_point=True), ("q_proj", "zero points")),
        (mx.Int8(activations="int8"), ("q_proj", "RoundedActivations")),
        (mx.GGUF("Q8_0"), ("q_proj", "Q8_0", "GGUF")),
        ({"embedding": mx.NF4(16)}, ("embedding", "floats")),
        ({"*.q_proj": mx.NF4(16), "*.k_proj": mx.Int8()}, ("q_proj", "k_proj", "two ways")),
    ],
)
def test_what_no_folder_can_hold_is_refused(recipe, words, config, getkey, tmp_path):
    small = mx.quantize(random_model(config, getkey()), recipe)
    with refused(*words):
        mx.save(small, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    with refused("dense"):
        mx.save(small, tmp_path / "small", format="mistral")


@pytest.mark.parametrize("recipe", [mx.NF4(16), mx.Int8(), {"*.up_proj": mx.GGUF("Q8_0"), "head": mx.FP8(by=16)}])
def test_a_checkpoint_is_quantized_while_it_is_read(recipe, config, getkey, tmp_path):
    model = random_model(config, getkey())
    mx.save(model, tmp_path / "model")
    small = mx.quantize(model, recipe)
    assert_same(mx.load(tmp_path / "model", quantize=recipe), small)
    mesh = mx.make_mesh("tp=2")
    split = mx.load(tmp_path / "model", quantize=recipe, mesh=mesh, strategy=mx.HEADS)
    expected = mx.shard(small, mesh, mx.HEADS)
    arrays = (jax.tree.leaves(eqx.filter(model, eqx.is_array)) for model in (split, expected))
    for one, other in zip(*arrays, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == other.sharding


def damaged(tensor):
    """A tensor in other shapes and of other kinds."""
    yield "none", None
    yield "flat", tensor.reshape(-1)
    yield "an axis more", tensor[None]
    yield "turned", tensor.T
    if tensor.size > 1:
        yield "a row less", tensor[:-1]
        yield "empty", tensor[:0]
    yield "in another type", tensor.astype(np.int32 if tensor.dtype != np.int32 else np.float32)
    yield "zeros", np.zeros_like(tensor)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_folder_is_refused_or_read(form, config, getkey, tmp_path):
    """Whatever a tensor of a quantized weight has become: one sentence, or a model."""
    (pack, settings), _ = FORMS[form]
    folder, _ = quantized.publish(tmp_path / "model", random_model(config, getkey()), pack, settings)
    header = read_header(folder / "model.safetensors", packed=True)
    tensors = {name: one.rows(0, one.shape[0] if one.shape else 1).reshape(one.shape) for name, one in header.items()}
    refusals = []
    for name in (name for name in tensors if "up_proj" in name):
        for _, changed in damaged(tensors[name]):
            kept = {**tensors, name: changed}
            kept = {key: np.ascontiguousarray(value) for key, value in kept.items() if value is not None}
            save_file(kept, folder / "model.safetensors")
            try:
                mx.load(folder)
            except mx.InputError as error:
                refusals.append(str(error))
    assert len(refusals) > 5
    assert not any("\n" in sentence for sentence in refusals)
