"""Files whose matrices differ in type: each keeps its own."""

import json

import equinox as eqx
import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fixtures import quantized
from fixtures.checkpoint import assert_same_weights, random_model, tiny, write_gguf
from fixtures.model import relative_error
from safetensors.numpy import load_file, save_file

import mistral_eqx as mx
from mistral_eqx.checkpoint import open_checkpoint
from mistral_eqx.checkpoint.names import layer_specs
from mistral_eqx.lora import adaptable_layers
from mistral_eqx.nn import DenseWeight
from mistral_eqx.nn.kernels import native


Kind = gguf.GGMLQuantizationType
MIXTURES = {
    "quantized": (
        Kind.Q8_0,
        {
            "token_embd.weight": Kind.BF16,
            "output.weight": Kind.F16,
            "attn_v.weight": Kind.F16,
            "ffn_up.weight": Kind.F32,
        },
    ),
    "floats": (Kind.BF16, {"output.weight": Kind.F32, "attn_q.weight": Kind.F16}),
}


@pytest.fixture(params=MIXTURES)
def mixed(request, getkey, tmp_path):
    """A GGUF file, and the type of each of its matrices."""
    kind, kinds = MIXTURES[request.param]
    path = write_gguf(tmp_path / "model.gguf", random_model(tiny(head_dim=32, vocab=64), getkey()), kind, kinds=kinds)
    return path, {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors if len(one.shape) > 1}


def types(model):
    """The type of each matrix, by its name in GGUF."""
    found = {}
    for path, layer in adaptable_layers(model).items():
        is_dense = isinstance(layer.weight, DenseWeight)
        found[path] = layer.weight.value.dtype.name if is_dense else layer.weight.format
    return {spec.name("gguf"): found[spec.path] for spec in layer_specs(model.config) if spec.in_dims}


def nbytes(model):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array))


def test_each_matrix_keeps_its_type(mixed):
    path, expected = mixed
    kept, expanded = mx.load(path), mx.load(path, dtype="float32")
    assert kept.dtype == "float32"
    assert types(kept) == {name: "float32" if kind == "F32" else kind for name, kind in expected.items()}
    assert nbytes(kept) == sum(tensor.nbytes for tensor in open_checkpoint(path).tensors.values())
    assert_same_weights(mx.dequantize(kept), expanded)
    ids = jnp.arange(12).reshape(2, 6)
    logits = eqx.filter_jit(expanded)(ids)
    # As in test_quant_blocks: of 14 products on a path each is within 4e-5.
    assert relative_error(eqx.filter_jit(kept)(ids), logits) < 14 * 4e-5
    mesh = mx.make_mesh("tp=2")
    for split in (mx.load(path, mesh=mesh, strategy=mx.HEADS), mx.shard(kept, mesh, mx.HEADS)):
        assert relative_error(eqx.filter_jit(split)(ids), logits) < 14 * 4e-5


@pytest.mark.parametrize("format", ["hf", "mistral"])
@pytest.mark.parametrize("mixed", ["floats"], indirect=True)
def test_floats_of_16_bits_are_saved_as_they_are(format, mixed, tmp_path):
    path, _ = mixed
    mx.save(mx.load(path), tmp_path / "out", format=format)
    assert_same_weights(mx.load(tmp_path / "out", dtype="float32"), mx.load(path, dtype="float32"))
    kinds = {tensor.stored for tensor in open_checkpoint(tmp_path / "out").tensors.values() if len(tensor.shape) > 1}
    assert kinds == {"BF16", "F16", "F32"}


def test_a_quantized_folder_keeps_16_bits_beside_its_blocks(getkey, tmp_path):
    folder, _ = quantized.publish(tmp_path / "model", random_model(tiny(), getkey()), *quantized.nf4(16))
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    save_file({**tensors, "model.embed_tokens.weight": table}, folder / "model.safetensors", {"format": "pt"})
    kept = mx.load(folder)
    assert kept.embedding.weight.format == "BF16"
    np.testing.assert_array_equal(kept.embedding.weight.dense(), table.astype(np.float32))
    mx.save(kept, tmp_path / "again")
    assert_same_weights(mx.load(tmp_path / "again"), kept)
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]["load_in_4bit"]


@pytest.mark.slow
@pytest.mark.parametrize("mixed", ["quantized"], indirect=True)
def test_beams_and_streams_are_those_of_the_expanded_model(mixed, monkeypatch):
    # Products of the kernels round activations.
    monkeypatch.setattr(native, "instructions", lambda: None)
    path, _ = mixed
    kept, expanded = mx.load(path), mx.load(path, dtype="float32")
    prompts, options = [[1, 2, 3], [4]], {"max_new_tokens": 6, "eos_id": ()}
    best = [mx.beam_search(model, prompts, num_beams=3, **options).tokens for model in (kept, expanded)]
    np.testing.assert_array_equal(*best)
    streamed = [np.stack(list(mx.stream(model, prompts, **options))) for model in (kept, expanded)]
    np.testing.assert_array_equal(*streamed)
