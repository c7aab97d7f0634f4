"""GGUF files with latent attention: written and read, in every form that converters write, and run by llama.cpp."""

import dataclasses
import functools
import math

import gguf
import jax.random as jr
import numpy as np
import pytest
from fixtures import llama_quantize
from fixtures.checkpoint import assert_same_weights
from fixtures.generation import refused
from fixtures.latent import DENSE, LATENT
from fixtures.model import relative_error, run, small_model
from fixtures.text import tiny as vocabularies

import mistral_eqx as mx
from mistral_eqx.checkpoint import gguf as dialect
from mistral_eqx.checkpoint.gguf_writing import _config_metadata, _tensors, chosen_types
from mistral_eqx.checkpoint.names import layer_specs
from mistral_eqx.quant import formats
from mistral_eqx.rope import LinearScaling, YarnScaling, yarn_magnitude


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.gguf"
    return mx.load_tokenizer(vocabularies.write_gguf(path, **vocabularies.byte_level_metadata()))


# Rows of a multiple of 32, for blocks; 64 positions are more than the original ones.
WIDE = dataclasses.replace(
    LATENT,
    embed=64,
    hidden=96,
    head_dim=48,
    max_positions=64,
    latent=mx.Latent(q_rank=32, kv_rank=64, nope_dim=32, rope_dim=16, value_dim=32),
    routing=dataclasses.replace(LATENT.routing, hidden=32),
)


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model(config=dataclasses.replace(WIDE, vocab=tokenizer.vocab))


def written(config):
    """The keys of a file, as if it had the config's vocabulary."""
    return {"general.architecture": "mistral4", **_config_metadata(config, "F32")}


def as_in_file(metadata):
    """Floats as a file has them."""
    return {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in metadata.items()}


def rewritten(path, target, change, rename=lambda key: key):
    """Writes a file whose tensors and keys are changed; `change` gets both and returns both."""
    reader = gguf.GGUFReader(path)
    keys = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {one.name: (one.data, one.tensor_type) for one in reader.tensors}
    values = {rename(name): (field.contents(), field.types) for name, field in keys.items()}
    tensors, values = change(tensors, values)
    writer = gguf.GGUFWriter(target, values.pop("general.architecture")[0])
    for name, (value, types) in values.items():
        writer.add_key_value(name, value, types[0], sub_type=types[-1] if len(types) > 1 else None)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def read_types(path):
    return {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}


def read_by_gguf(path):
    """The numbers of each tensor by gguf-py, and its type."""
    tensors = gguf.GGUFReader(path).tensors
    return {one.name: (gguf.quants.dequantize(one.data, one.tensor_type), one.tensor_type.name) for one in tensors}


def test_saved_is_loaded_bit_for_bit(model, tokenizer, tmp_path):
    mx.save(model, tmp_path / "a.gguf", format="gguf", tokenizer=tokenizer)
    again = mx.load(tmp_path / "a.gguf")
    assert again.config == dataclasses.replace(model.config, eos_ids=again.config.eos_ids, bos_id=tokenizer.bos_id)
    assert_same_weights(again, model)
    tensors = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    both = np.asarray(model.blocks[1].attention.kv_b_proj.weight.value)
    np.testing.assert_array_equal(tensors["blk.1.attn_k_b.weight"], both[:, :32].swapaxes(1, 2))
    np.testing.assert_array_equal(tensors["blk.1.attn_v_b.weight"], both[:, 32:])
    assert tensors["blk.0.ffn_up.weight"].shape == (96, 64)
    assert tensors["blk.1.ffn_up_shexp.weight"].shape == (64, 64)
    mx.save(model, tmp_path / "folder", finish=tokenizer.save)
    mx.convert(tmp_path / "folder", tmp_path / "b.gguf", format="gguf")
    mx.convert(tmp_path / "b.gguf", tmp_path / "c", format="hf", tokenizer=False)
    assert_same_weights(mx.load(tmp_path / "c"), model)
    split = mx.load(tmp_path / "a.gguf", mesh=mx.make_mesh("ep=2,tp=2"), strategy=mx.Strategy("kv_heads@tp experts@ep"))
    assert_same_weights(split, model)


@pytest.mark.parametrize("kind", ["Q8_0", pytest.param("Q4_K_M", marks=pytest.mark.slow)])
def test_blocks_are_kept_and_the_numbers_are_those_of_gguf(kind, model, tokenizer, tmp_path, without_kernels):
    path = tmp_path / "a.gguf"
    mx.save(model, path, format="gguf", type=kind, tokenizer=tokenizer)
    theirs, kept = read_by_gguf(path), mx.load(path)
    attention, layer = kept.blocks[1].attention, kept.blocks[1].feed_forward
    for name, weight in {
        "attn_q_a": attention.q_a_proj.weight,
        "attn_q_b": attention.q_b_proj.weight,
        "attn_kv_a_mqa": attention.kv_a_proj.weight,
        "attn_output": attention.o_proj.weight,
        "ffn_gate_exps": layer.gate_proj.weight,
        "ffn_down_exps": layer.down_proj.weight,
        "ffn_down_shexp": layer.shared.down_proj.weight,
    }.items():
        numbers, type = theirs[f"blk.1.{name}.weight"]
        assert (weight.format, type == "F32") == (type, False)
        np.testing.assert_array_equal(np.asarray(weight.dense()).reshape(numbers.shape), numbers)
    keys, values = (theirs[f"blk.1.attn_{part}_b.weight"] for part in "kv")
    assert (keys[1], values[1]) == (("Q8_0", "Q8_0") if kind == "Q8_0" else ("Q5_0", "Q5_0"))
    both = np.concatenate([keys[0].swapaxes(1, 2), values[0]], axis=1)
    np.testing.assert_array_equal(attention.kv_b_proj.weight.value, both)
    # Written again, all blocks but those of keys and values stay, and these in float32.
    mx.save(kept, tmp_path / "b.gguf", format="gguf", tokenizer=tokenizer)
    again = read_by_gguf(tmp_path / "b.gguf")
    assert {name for name in theirs if theirs[name][1] != again[name][1]} == {
        f"blk.{layer}.attn_{part}_b.weight" for layer in (0, 1) for part in "kv"
    }
    for name, (numbers, _) in theirs.items():
        np.testing.assert_array_equal(again[name][0], numbers)
    if kind == "Q8_0":
        return
    ids = np.arange(64, dtype=np.int32).reshape(1, 64) % model.config.vocab
    expected, _ = run(mx.load(path, dtype="float32"), ids)
    # The error of float32.
    assert relative_error(run(kept, ids)[0], expected) < 1e-5


def test_a_quantized_model_is_written(model, tokenizer, tmp_path):
    """Keys and values keep their numbers, in float32: their blocks would be of other columns."""
    small = mx.quantize(model, mx.GGUF("Q8_0"))
    mx.save(small, tmp_path / "a.gguf", format="gguf", tokenizer=tokenizer)
    again = mx.load(tmp_path / "a.gguf")
    assert formats(again) == ["Q8_0"]
    assert_same_weights(mx.dequantize(again), mx.dequantize(small))


def fused(tensors, values):
    """The rows of an expert's `gate_proj` before those of its `up_proj`, as llama.cpp's converter has them."""
    found = dict(tensors)
    for name, (gate, kind) in tensors.items():
        if "ffn_gate_exps" in name:
            up, _ = found.pop(name.replace("gate", "up"))
            del found[name]
            found[name.replace("gate", "gate_up")] = np.concatenate([gate, up], axis=1), kind
    return found, values


def not_divided(tensors, values):
    """One tensor for keys and values, and the sizes of heads that are not absorbed, as in old files."""
    found = dict(tensors)
    for name, (values_, kind) in tensors.items():
        if "attn_v_b" in name:
            keys, _ = found.pop(name.replace("_v_b", "_k_b"))
            del found[name]
            both = np.concatenate([keys.swapaxes(1, 2), values_], axis=1)
            found[name.replace("_v_b", "_kv_b")] = both.reshape(-1, both.shape[-1]), kind
    values = dict(values)
    for name in ("key_length", "value_length"):
        values[f"mistral4.attention.{name}"] = values.pop(f"mistral4.attention.{name}_mla")
    values["mistral4.attention.head_count_kv"] = values["mistral4.attention.head_count"]
    return found, values


@pytest.mark.parametrize("change", [pytest.param(fused, marks=pytest.mark.slow), not_divided])
def test_other_forms_of_a_file_are_read(change, model, tokenizer, tmp_path):
    for kind in ("F32", "Q8_0") if change is fused else ("F32",):
        mx.save(model, tmp_path / f"{kind}.gguf", format="gguf", type=kind, tokenizer=tokenizer)
        expected = mx.load(tmp_path / f"{kind}.gguf")
        found = mx.load(rewritten(tmp_path / f"{kind}.gguf", tmp_path / f"{kind}-other.gguf", change))
        assert found.config == expected.config
        assert formats(found) == formats(expected)
        assert_same_weights(mx.dequantize(found), mx.dequantize(expected))


def test_the_other_architecture(model, tokenizer, tmp_path):
    """`deepseek2`, which the converter writes for Large 3; there a multiplier leaves cosines and sines alone."""
    path = tmp_path / "a.gguf"
    mx.save(model, path, format="gguf", tokenizer=tokenizer)

    def change(tensors, values):
        values = {**values, "general.architecture": ("deepseek2", values["general.architecture"][1])}
        key = "deepseek2.rope.scaling.yarn_log_multiplier"
        values[key] = 0.1, values[key][1]
        del values["deepseek2.rope.scaling.attn_factor"]
        return tensors, values

    found = mx.load(rewritten(path, tmp_path / "b.gguf", change, lambda key: key.replace("mistral4.", "deepseek2.")))
    assert_same_weights(found, model)
    assert found.config.rope_scaling == YarnScaling(8.0, 16, 1.0)
    assert found.config.latent.scale == yarn_magnitude(8.0) ** 2


G = yarn_magnitude(8.0)


@pytest.mark.parametrize(
    ("magnitude", "scale"), [(1.0, 1.0), (G, 1.0), (1.0, G**2), (1.2, 1.0), (1.2, 1.7), (0.9, G**2), (1.3, 1.69)]
)
def test_magnitudes_and_factors_of_scores_are_read_again(magnitude, scale):
    latent = dataclasses.replace(LATENT.latent, scale=scale)
    config = dataclasses.replace(LATENT, rope_scaling=YarnScaling(8.0, 16, magnitude), latent=latent)
    metadata = written(config)
    found = dialect.read_config(as_in_file(metadata))
    assert dataclasses.replace(found, bos_id=1, eos_ids=(2,)) == config
    # What llama.cpp computes from these keys.
    log = math.log(8.0)
    multiplier = 10 * metadata["mistral4.rope.scaling.yarn_log_multiplier"]
    factor = metadata.get("mistral4.rope.scaling.attn_factor", 1.0)
    own = (1 + 0.1 * log) / (1 + 0.1 * multiplier * log) if multiplier else 1 + 0.1 * log
    assert factor * own == pytest.approx(magnitude, rel=1e-12)
    assert (factor * own * (1 + 0.1 * multiplier * log)) ** 2 == pytest.approx(scale, rel=1e-12)


def test_configs():
    for config in (
        mx.PRESETS["small-4-119b"],
        mx.PRESETS["large-3-675b"],
        DENSE,
        dataclasses.replace(LATENT, rope_scaling=None, query_scaling=None),
        dataclasses.replace(LATENT, routing=dataclasses.replace(LATENT.routing, normalized=False, scale=1.0)),
    ):
        found = dialect.read_config(as_in_file(written(config)), tied=config.tied)
        assert dataclasses.replace(found, bos_id=config.bos_id, eos_ids=config.eos_ids) == config


METADATA = as_in_file(written(LATENT))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mistral4.expert_gating_func": 2}, "expert_gating_func 2"),
        ({"mistral4.attention.head_count_kv": 4}, "head_count_kv 4"),
        ({"mistral4.attention.key_length": 16}, "key_length 16"),
        ({"mistral4.rope.scaling.type": "linear"}, "rope.scaling.factor to 8.0"),
        ({"mistral4.attention.sliding_window": 8}, "layers with windows"),
        ({"mistral4.nextn_predict_layers": 1}, "sets mistral4.nextn_predict_layers to 1"),
        ({"mistral4.attention.key_length_mla": 6}, "nope_dim"),
        ({"mistral4.expert_group_count": 3}, "8 experts into 3 groups"),
    ],
)
def test_a_file_that_is_not_supported_is_refused(change, words):
    with refused(words):
        dialect.read_config({**METADATA, **change})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dataclasses.replace(LATENT, norm_eps=1e-5), "one for both"),
        (dataclasses.replace(LATENT, routing=mx.Routing(4, 2)), "shared experts"),
        (dataclasses.replace(LATENT, rope_scaling=LinearScaling(2.0)), "YaRN, or neither"),
        (
            dataclasses.replace(LATENT, rope_scaling=None, latent=dataclasses.replace(LATENT.latent, scale=2.0)),
            "scale of 2.0",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_refused(config, words):
    with refused(words):
        _config_metadata(config, "F32")


def test_a_tensor_of_another_shape_is_refused(model, tokenizer, tmp_path):
    path = tmp_path / "a.gguf"
    mx.save(model, path, format="gguf", tokenizer=tokenizer)

    def change(name, tensors, values):
        data, kind = tensors[name]
        return {**tensors, name: (data[:, :-1], kind)}, values

    for name in ("blk.0.attn_k_b.weight", "blk.1.attn_v_b.weight"):
        with refused(name, "fetch both again"):
            mx.load(rewritten(path, tmp_path / "b.gguf", functools.partial(change, name)))
    with refused("blk.0.attn_kv_b.weight"):
        mx.load(
            rewritten(
                path,
                tmp_path / "b.gguf",
                lambda tensors, values: (
                    {name: one for name, one in tensors.items() if name != "blk.0.attn_k_b.weight"},
                    values,
                ),
            )
        )


@pytest.mark.parity
def test_mixtures_are_those_of_llama_quantize(tokenizer, tmp_path):
    """With rows of 256, 64 and 32 numbers, and in the first eighth of the layers."""
    latent = mx.Latent(q_rank=256, kv_rank=256, nope_dim=64, rope_dim=32, value_dim=64)
    routing = dataclasses.replace(LATENT.routing, experts=16, hidden=64, shared=1)
    sizes = {"vocab": tokenizer.vocab, "embed": 256, "hidden": 256, "layers": 9, "windows": (None,) * 9, "head_dim": 96}
    config = dataclasses.replace(LATENT, **sizes, latent=latent, routing=routing)
    source, model = tmp_path / "f16.gguf", mx.Mistral.init(config, key=jr.key(0))
    mx.save(model, source, format="gguf", type="F16", tokenizer=tokenizer)
    for mixture in ("Q3_K_M", "Q4_K_M", "IQ4_XS"):
        theirs = read_types(llama_quantize.quantize_file(source, tmp_path / "theirs.gguf", mixture))
        types = chosen_types(config, mixture, {})
        ours = {
            name: kind for spec in layer_specs(config) for name, _, kind in _tensors(spec, config, types[spec.path])
        }
        assert ours == theirs, mixture


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "change", "magnitude", "scale"),
    [
        ("F32", None, 1.0, 1.0),
        ("F32", fused, G, 1.0),
        ("F32", None, 1.2, 1.7),
        ("Q8_0", None, 1.0, G**2),
        ("Q4_K_M", fused, 1.0, 1.0),
    ],
)
def test_llama_cpp_computes_the_same(kind, change, magnitude, scale, model, tokenizer, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    latent = dataclasses.replace(model.config.latent, scale=scale)
    config = dataclasses.replace(model.config, rope_scaling=YarnScaling(8.0, 16, magnitude), latent=latent)
    path = tmp_path / "a.gguf"
    mx.save(small_model(config=config), path, format="gguf", type=kind, tokenizer=tokenizer)
    path = path if change is None else rewritten(path, tmp_path / "b.gguf", change)
    ids = np.random.default_rng(0).integers(0, config.vocab, 48).astype(np.int32)
    floats = llama_cpp.GGML_TYPE_F32
    theirs = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, type_k=floats, type_v=floats)
    theirs.eval(ids.tolist())
    found, _ = run(mx.load(path, dtype="float32"), ids[None])
    expected = np.asarray(theirs.scores[: len(ids)])
    errors = np.abs(found[0] - expected).max(axis=-1) / np.abs(expected).max()
    if kind == "F32":
        assert errors.max() < 2e-5
        np.testing.assert_array_equal(np.argmax(found[0], axis=-1), expected.argmax(axis=-1))
    else:
        # llama.cpp rounds activations to 8 bits where weights are quantized, by up to 1 / 254 in each of some ten
        # products, after which some tokens choose other experts. Numbers in another order have an error of about 1.
        assert np.median(errors) < 0.1
