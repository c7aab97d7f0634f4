"""Checkpoints with latent attention: both dialects written and read, wrapped, and what is refused."""

import dataclasses
import json

import jax.random as jr
import numpy as np
import pytest
from fixtures.checkpoint import assert_same_weights, random_model, weights
from fixtures.generation import refused
from fixtures.latent import DENSE, LATENT
from fixtures.model import relative_error, run, small_model
from fixtures.quantized import fp8
from safetensors.numpy import load_file, save_file
from test_checkpoint_wrapped import SKIPPED, since_5, wrap

import mistral_eqx as mx
from mistral_eqx.checkpoint import hf, mistral
from mistral_eqx.checkpoint.names import layer_specs
from mistral_eqx.quant import formats
from mistral_eqx.rope import yarn_magnitude


PLAIN = dataclasses.replace(LATENT, rope_scaling=dataclasses.replace(LATENT.rope_scaling, magnitude=1.0))
HF, PARAMS = hf.write_config(LATENT), mistral.write_config(PLAIN)
ROPE = HF["rope_parameters"]
SMALL_4 = mx.PRESETS["small-4-119b"]


@pytest.fixture(scope="module")
def model():
    return small_model(config=PLAIN)


@pytest.mark.parametrize("format", ["hf", "mistral"])
def test_fp8_releases_keep_one_byte_a_weight(model, format, tmp_path):
    """Logits are those of the numbers that codes and scales stand for."""
    for folder in ("fp8", "plain"):
        mx.save(model, tmp_path / folder, format=format)
    (file,) = (tmp_path / "fp8").glob("*.safetensors")
    pack, quantization = fp8()
    found, plain = {}, {}
    ends = {"hf": ("weight_scale_inv", "activation_scale"), "mistral": ("qscale_weight", "qscale_act")}[format]
    for name, value in load_file(file).items():
        stem, stacked = name.removesuffix(".weight"), value.ndim == 3
        plain[name] = found[name] = value
        if value.ndim == 1 or stem.endswith(("gate", "embed_tokens", "lm_head", "tok_embeddings", "output")):
            continue
        packed = [pack(one) for one in (value if stacked else [value])]
        if stacked:
            found[name], plain[name] = (
                np.stack(each) for each in zip(*((p["weight"], n) for p, n in packed), strict=True)
            )
            found[f"{name}_scale_inv"] = np.stack([np.full((1, 1), parts["weight_scale_inv"]) for parts, _ in packed])
        else:
            parts, plain[name] = packed[0]
            found[name] = parts["weight"]
            found |= {
                f"{stem}.{ends[0]}": np.asarray(parts["weight_scale_inv"]),
                f"{stem}.{ends[1]}": np.ones((), np.float32),
            }
    save_file(found, file)
    save_file(plain, tmp_path / "plain" / file.name)
    path = tmp_path / "fp8" / {"hf": "config.json", "mistral": "params.json"}[format]
    more = {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    more = {"quantization_config": quantization} if format == "hf" else more
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    loaded, ids = mx.load(tmp_path / "fp8"), np.arange(48, dtype=np.int32).reshape(2, 24)
    assert formats(loaded) == ["FP8"]
    expected, _ = run(mx.load(tmp_path / "plain"), ids)
    # Codes of FP8 are multiplied as floats: the error of float32.
    assert relative_error(run(loaded, ids)[0], expected) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [pytest.param(mx.FP8(), marks=pytest.mark.long), mx.GGUF("Q4_0")], ids=str)
def test_a_quantized_model_is_that_of_its_numbers(scheme):
    sizes = {"embed": 64, "hidden": 64, "head_dim": 32}
    latent = mx.Latent(q_rank=32, kv_rank=32, nope_dim=16, rope_dim=16, value_dim=32)
    routing = dataclasses.replace(PLAIN.routing, hidden=64, shared=1)
    config = dataclasses.replace(PLAIN, **sizes, latent=latent, routing=routing)
    model = mx.Mistral.init(config, key=jr.key(0))
    small, ids = mx.quantize(model, scheme), np.arange(64, dtype=np.int32).reshape(2, 32)
    expanded = mx.dequantize(small)
    assert relative_error(run(small, ids)[0], run(expanded, ids)[0]) < 2e-5
    expected = mx.generate(expanded, [[1, 5, 9]], max_new_tokens=12).tokens
    split = mx.shard(small, mx.make_mesh("tp=2"), mx.HEADS)
    for one in (small, split):
        np.testing.assert_array_equal(mx.generate(one, [[1, 5, 9]], max_new_tokens=12).tokens, expected)


@pytest.mark.parametrize("format", ["hf", "mistral"])
def test_saved_is_loaded_bit_for_bit(model, format, tmp_path):
    mx.save(model, tmp_path / "a", format=format, max_shard_size="20KB")
    again = mx.load(tmp_path / "a")
    assert again.config == model.config
    assert_same_weights(again, model)
    other = "mistral" if format == "hf" else "hf"
    mx.convert(tmp_path / "a", tmp_path / "b", format=other, tokenizer=False)
    assert_same_weights(mx.load(tmp_path / "b"), model)


def test_names_of_both_dialects(model, tmp_path):
    for format, file in (("hf", "model.safetensors"), ("mistral", "consolidated.safetensors")):
        mx.save(model, tmp_path / format, format=format)
        tensors = load_file(tmp_path / format / file)
        layer = model.blocks[1].feed_forward
        gate, up, down = (np.asarray(one.weight.value) for one in (layer.gate_proj, layer.up_proj, layer.down_proj))
        if format == "hf":
            both = tensors["model.layers.1.mlp.experts.gate_up_proj"]
            np.testing.assert_array_equal(both, np.concatenate([gate, up], axis=1))
            np.testing.assert_array_equal(tensors["model.layers.1.mlp.experts.down_proj"], down)
            assert tensors["model.layers.1.mlp.shared_experts.down_proj.weight"].shape == (24, 80)
            assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (48, 24)
            assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (32, 24)
        else:
            np.testing.assert_array_equal(tensors["layers.1.experts.7.w2.weight"], down[7])
            assert tensors["layers.1.gate.weight"].shape == (8, 24)
            assert tensors["layers.1.shared_experts.w3.weight"].shape == (80, 24)
            assert tensors["layers.0.feed_forward.w1.weight"].shape == (48, 24)
            assert tensors["layers.0.attention.wkv_a_with_mqa.weight"].shape == (32, 24)
            assert tensors["layers.0.attention.q_a_norm.weight"].shape == (20,)


def test_every_weight_of_the_model_has_a_row(getkey):
    shapes = {spec.path: spec.shape(LATENT) for spec in layer_specs(LATENT)}
    assert {path: array.shape for path, array in weights(random_model(LATENT, getkey())).items()} == shapes


def test_a_wrapper_is_the_text_model(model, tmp_path):
    mx.save(model, tmp_path / "a")
    wrap(tmp_path / "a", since_5)
    with pytest.warns(UserWarning, match=SKIPPED):
        loaded = mx.load(tmp_path / "a")
    assert loaded.config == PLAIN
    assert_same_weights(loaded, model)


def test_each_device_reads_its_own_rows(model, tmp_path):
    mx.save(model, tmp_path / "a")
    strategy = mx.Strategy("kv_heads@tp hidden@tp vocab@tp experts@ep")
    split = mx.load(tmp_path / "a", mesh=mx.make_mesh("ep=2,tp=2"), strategy=strategy)
    assert_same_weights(split, model)
    layer = split.blocks[1]
    assert layer.feed_forward.up_proj.weight.value.addressable_shards[0].data.shape == (4, 20, 24)
    assert layer.attention.kv_b_proj.weight.value.addressable_shards[0].data.shape == (2, 24, 26)
    # And they are written from there to where one device writes them, in tensors with three axes too.
    mx.save(split, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_configs():
    assert HF["model_type"] == "mistral4"
    assert hf.read_config(HF) == LATENT
    assert mistral.read_config(PARAMS) == PLAIN
    for config in (DENSE, dataclasses.replace(LATENT, query_scaling=None, rope_scaling=None), SMALL_4):
        assert hf.read_config(hf.write_config(config)) == config
    plain = dataclasses.replace(DENSE, rope_scaling=PLAIN.rope_scaling)
    assert mistral.read_config(mistral.write_config(plain)) == plain
    for name in ("small-4-119b", "large-3-675b"):
        assert mistral.read_config(mistral.write_config(mx.PRESETS[name])) == mx.PRESETS[name]
    # The defaults of transformers are Small 4's.
    assert hf.read_config({"model_type": "mistral4"}) == SMALL_4
    # Large 3 has both lengths; the second one is that of a server.
    assert mistral.read_config({**PARAMS, "max_seq_len": 32}) == PLAIN
    more = {**PARAMS["moe"], "expert_parallel": 1, "expert_model_parallel": 8}
    assert mistral.read_config({**PARAMS, "moe": more}) == PLAIN


def test_the_factor_of_the_scores():
    """Plain where mscale and mscale_all_dim are equal, as for `apply_scale` false; otherwise as in transformers."""
    square = yarn_magnitude(8.0) ** 2
    plain = {key: value for key, value in ROPE.items() if key != "attention_factor"}
    for more, scale, magnitude in (
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.0}, 1.0, yarn_magnitude(8.0)),
        ({"mscale_all_dim": 1.0, "attention_factor": 1.0}, square, 1.0),
        ({"attention_factor": 1.2}, 1.0, 1.2),
    ):
        config = hf.read_config({**HF, "rope_parameters": {**plain, **more}, "rope_scaling": None})
        assert config.latent.scale == scale
        assert config.rope_scaling.magnitude == magnitude
        assert hf.read_config(hf.write_config(config)) == config
    assert mistral.read_config(PARAMS).latent.scale == 1


@pytest.mark.parametrize(
    ("read", "settings", "words"),
    [
        (hf.read_config, {**HF, "q_lora_rank": None}, "sets q_lora_rank to None"),
        (hf.read_config, {**HF, "rope_interleave": False}, "rope_interleave False"),
        (hf.read_config, {**HF, "num_key_value_heads": 2}, "2 query heads for each key/value head"),
        (hf.read_config, {**HF, "n_group": 3}, "8 experts into 3 groups"),
        (hf.read_config, {**HF, "n_shared_experts": 0}, "n_shared_experts"),
        (hf.read_config, {**HF, "sliding_window": 16}, "sets sliding_window to 16"),
        (hf.read_config, {**HF, "num_local_experts": 9}, "n_routed_experts 8 and num_local_experts 9"),
        (hf.read_config, {**HF, "qk_head_dim": 20}, "qk_head_dim 20"),
        (hf.read_config, {**HF, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (mistral.read_config, {**PARAMS, "moe": {**PARAMS["moe"], "route_every_n": 2}}, "route_every_n 2"),
        (mistral.read_config, {**PARAMS, "v_head_dim": None}, "v_head_dim"),
        (mistral.read_config, {**PARAMS, "head_dim": 20}, "latent.nope_dim + latent.rope_dim = 16"),
    ],
)
def test_a_config_that_is_wrong_or_not_supported_is_refused(read, settings, words):
    with refused(words):
        read(settings)


def _with(**changes):
    return dataclasses.replace(PLAIN, latent=dataclasses.replace(PLAIN.latent, **changes))


@pytest.mark.parametrize(
    ("write", "config", "words"),
    [
        (hf.write_config, _with(scale=1.3), "latent.scale is 1.3"),
        (hf.write_config, _with(eps=1e-5), "can hold 1e-6 alone"),
        (mistral.write_config, _with(scale=1.3), "a scale of 1.3"),
        (hf.write_config, dataclasses.replace(PLAIN, routing=mx.Routing(4, 2)), "of which none is shared"),
        (mistral.write_config, dataclasses.replace(PLAIN, routing=mx.Routing(4, 2, normalized=False)), "the sum 1"),
        (hf.write_config, dataclasses.replace(PLAIN, latent=None, routing=mx.Routing(4, 2, shared=1)), "no model type"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(write, config, words):
    with refused(words):
        write(config)


def test_a_tensor_of_another_shape_is_refused(model, tmp_path):
    mx.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    save_file({**tensors, name: tensors[name][:, :78]}, tmp_path / "model.safetensors")
    with refused(name, "has shape (8, 78, 24)", "requires (8, 80, 24)"):
        mx.load(tmp_path)
