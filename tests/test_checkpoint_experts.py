"""Checkpoints with experts: each dialect's names, written and read, and what is refused."""

import dataclasses
import json

import equinox as eqx
import gguf
import jax
import numpy as np
import pytest
from fixtures import quantized
from fixtures.cases import every_third
from fixtures.checkpoint import TINY
from fixtures.latent import LATENT
from fixtures.model import relative_error, run, small_model
from fixtures.text import tiny as vocabularies
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mistral_eqx as mx
from mistral_eqx.checkpoint import gguf as gguf_dialect, hf, mistral
from mistral_eqx.checkpoint.experts import RowsTensor
from mistral_eqx.checkpoint.reader import LazyTensor
from mistral_eqx.config import Routing
from mistral_eqx.quant import formats


ROUTED = dataclasses.replace(TINY, routing=Routing(experts=3, per_token=2))


@pytest.fixture(scope="module")
def model():
    return small_model(config=ROUTED)


def assert_same(one, other):
    one, other = (jax.tree_util.tree_leaves_with_path(model) for model in (one, other))
    assert [path for path, _ in one] == [path for path, _ in other]
    for (_, array), (_, expected) in zip(one, other, strict=True):
        if isinstance(expected, jax.Array):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
        else:
            assert array == expected


@pytest.mark.parametrize(
    ("format", "file", "names"),
    [
        ("hf", "model.safetensors", "model.layers.{}.block_sparse_moe."),
        ("mistral", "consolidated.safetensors", "layers.{}.feed_forward."),
    ],
)
def test_saved_is_loaded_bit_for_bit(model, format, file, names, tmp_path):
    mx.save(model, tmp_path / "model", format=format)
    tensors = load_file(tmp_path / "model" / file)
    for layer, block in enumerate(model.blocks):
        prefix, layers = names.format(layer), block.feed_forward
        np.testing.assert_array_equal(tensors[f"{prefix}gate.weight"], layers.router.weight.value)
        for name, one in (("w1", layers.gate_proj), ("w2", layers.down_proj), ("w3", layers.up_proj)):
            for expert in range(3):
                np.testing.assert_array_equal(
                    tensors[f"{prefix}experts.{expert}.{name}.weight"], one.weight.value[expert]
                )
    assert_same(mx.load(tmp_path / "model"), model)


def test_several_files_and_converted(model, tmp_path):
    mx.save(model, tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 5
    assert_same(mx.load(tmp_path / "one"), model)
    mx.convert(tmp_path / "one", tmp_path / "two", format="mistral", tokenizer=False)
    mx.convert(tmp_path / "two", tmp_path / "three", format="hf", tokenizer=False)
    assert_same(mx.load(tmp_path / "three"), model)


def test_stacked_names_of_newer_models(model, tmp_path):
    """`gate_up_proj` has the rows of `gate_proj` before those of `up_proj`, in each expert."""
    mx.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer, block in enumerate(model.blocks):
        old, new = (f"model.layers.{layer}.{name}." for name in ("block_sparse_moe", "mlp"))
        layers = block.feed_forward
        for name in [name for name in tensors if name.startswith(f"{old}experts")]:
            del tensors[name]
        tensors[f"{new}gate.weight"] = tensors.pop(f"{old}gate.weight")
        both = [np.asarray(one.weight.value) for one in (layers.gate_proj, layers.up_proj)]
        tensors[f"{new}experts.gate_up_proj"] = np.concatenate(both, axis=1)
        tensors[f"{new}experts.down_proj"] = np.asarray(layers.down_proj.weight.value)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(mx.load(tmp_path), model)
    # On a mesh, each process reads the rows of its own experts.
    mesh = mx.make_mesh("ep=3,tp=2")
    split = mx.load(tmp_path, mesh=mesh, strategy=mx.Strategy("experts@ep hidden@tp"))
    down = split.blocks[1].feed_forward.down_proj.weight.value
    assert {shard.data.shape for shard in down.addressable_shards} == {(1, 32, 32)}
    np.testing.assert_array_equal(down, model.blocks[1].feed_forward.down_proj.weight.value)
    mx.save(model, tmp_path / "one")
    mx.save(split, tmp_path / "several")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "several/model.safetensors").read_bytes()


def test_rows_of_several_tensors():
    class InMemory(LazyTensor):
        def __init__(self, name, array):
            super().__init__(name, array.shape, array.dtype, "F32", array.nbytes)
            self.array = array

        def rows(self, start, stop, columns=None):
            found = self.array[start:stop]
            return found if columns is None else found[:, columns]

    numbers = np.arange(2 * 4 * 5, dtype=np.float32).reshape(2, 4, 5)
    stacked = InMemory("stacked", numbers)
    tensor = RowsTensor("part", [(stacked, 1, 2), (stacked, 5, 3)])
    expected = numbers.reshape(8, 5)[[1, 2, 5, 6, 7]]
    assert (tensor.shape, tensor.nbytes) == ((5, 5), 5 * 5 * 4)
    for start in range(5):
        for stop in range(start + 1, 6):
            np.testing.assert_array_equal(tensor.rows(start, stop), expected[start:stop])
            np.testing.assert_array_equal(tensor.rows(start, stop, np.array([1, 3])), expected[start:stop, [1, 3]])
    matrices = RowsTensor("all", [(InMemory(str(one), numbers[one]), 0, 4) for one in range(2)])
    np.testing.assert_array_equal(matrices.rows(2, 7), numbers.reshape(8, 5)[2:7])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.gguf"
    return mx.load_tokenizer(vocabularies.write_gguf(path, **vocabularies.byte_level_metadata()))


@pytest.fixture(scope="module")
def worded(tokenizer):
    return small_model(config=dataclasses.replace(ROUTED, vocab=tokenizer.vocab))


def test_gguf_stacks_experts(worded, tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    mx.save(worded, path, format="gguf", tokenizer=tokenizer)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    layers = worded.blocks[0].feed_forward
    for name, one in (("gate", layers.gate_proj), ("up", layers.up_proj), ("down", layers.down_proj)):
        np.testing.assert_array_equal(tensors[f"blk.0.ffn_{name}_exps.weight"].data, one.weight.value)
    again = mx.load(path)
    assert again.config.routing == worded.config.routing
    found, expected = (jax.tree.leaves(eqx.filter(one, eqx.is_array)) for one in (again, worded))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("type", ["Q8_0", "F16", pytest.param("Q4_K_M", marks=pytest.mark.slow)])
def test_quantized_experts_of_a_gguf_file_keep_their_blocks(type, worded, tokenizer, tmp_path, without_kernels):
    path = tmp_path / "model.gguf"
    mx.save(worded, path, format="gguf", type=type, tokenizer=tokenizer)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    tensor = tensors["blk.1.ffn_up_exps.weight"]
    assert tensor.tensor_type.name != "F32"
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(3, 64, 32)
    loaded = mx.load(path)
    weight = loaded.blocks[1].feed_forward.up_proj.weight
    assert weight.format == tensor.tensor_type.name
    assert weight.blocks.nbytes == tensor.n_bytes
    np.testing.assert_array_equal(weight.dense(), expected)
    # The error of float32.
    ids = np.random.default_rng(0).integers(0, worded.config.vocab, (2, 24)).astype(np.int32)
    dense, _ = run(mx.load(path, dtype="float32"), ids)
    found, _ = run(loaded, ids)
    assert relative_error(found, dense) < 1e-5
    # Written again, the blocks are those of the file.
    mx.save(loaded, tmp_path / "again.gguf", format="gguf", tokenizer=tokenizer)
    again = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "again.gguf").tensors}
    np.testing.assert_array_equal(again["blk.1.ffn_up_exps.weight"].data, tensor.data)


def test_blocks_of_experts_on_a_mesh(worded, tokenizer, tmp_path):
    path, ids = tmp_path / "model.gguf", np.arange(48, dtype=np.int32).reshape(2, 24)
    mx.save(worded, path, format="gguf", type="Q8_0", tokenizer=tokenizer)
    expected, _ = run(mx.load(path), ids)
    for layout, axes, own in (("experts@ep", "ep=3", 1), ("experts@ep hidden@tp", "ep=3,tp=2", 1)):
        split = mx.load(path, mesh=mx.make_mesh(axes), strategy=mx.Strategy(layout))
        blocks = split.blocks[0].feed_forward.down_proj.weight.blocks
        assert {shard.data.shape[0] for shard in blocks.addressable_shards} == {own}
        # Groups are as large as on one device; each device sums its own terms in float32.
        assert relative_error(eqx.filter_jit(split)(ids), expected) < 1e-5


@pytest.mark.parametrize(
    ("stacked", "block"), [(False, None), (True, None), pytest.param(True, (16, 32), marks=pytest.mark.slow)]
)
def test_fp8_folders_keep_one_byte_a_weight(stacked, block, model, tmp_path):
    mx.save(model, tmp_path)
    (pack, config), tensors = quantized.fp8(block), load_file(tmp_path / "model.safetensors")
    numbers = {}

    def packed(name):
        found = []
        for expert in range(3):
            parts, numbers[name, expert] = pack(tensors.pop(f"{old}{expert}.{name}.weight"))
            found.append({end: np.asarray(part) for end, part in parts.items()})
        return found

    def stack(experts, name, scales):
        tensors[f"{new}{name}"] = np.stack([one["weight"] for one in experts])
        tensors[f"{new}{name}_scale_inv"] = np.stack([np.atleast_2d(one) for one in scales])
        tensors[f"{new}{name}_activation_scale"] = np.ones(3, np.float32)

    for layer in range(2):
        old, new = f"model.layers.{layer}.block_sparse_moe.experts.", f"model.layers.{layer}.mlp.experts."
        gate, up, down = (packed(name) for name in ("w1", "w3", "w2"))
        if not stacked:
            for name, experts in (("w1", gate), ("w3", up), ("w2", down)):
                for expert, parts in enumerate(experts):
                    tensors |= {f"{old}{expert}.{name}.{end}": part for end, part in parts.items()}
            continue
        both = [
            {"weight": np.concatenate([one["weight"], other["weight"]])} for one, other in zip(gate, up, strict=True)
        ]
        scales = [
            one["weight_scale_inv"]
            if block is None
            else np.concatenate([one["weight_scale_inv"], other["weight_scale_inv"]])
            for one, other in zip(gate, up, strict=True)
        ]
        stack(both, "gate_up_proj", scales)
        stack(down, "down_proj", [one["weight_scale_inv"] for one in down])
    save_file(tensors, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    loaded = mx.load(tmp_path)
    layers = loaded.blocks[1].feed_forward
    # Without blocks, gate and up have one scale, here that of gate.
    for name, short in (("gate_proj", "w1"), ("down_proj", "w2"), *([("up_proj", "w3")] if block else [])):
        expected = np.stack([numbers[short, expert] for expert in range(3)])
        np.testing.assert_array_equal(getattr(layers, name).weight.dense(), expected)
    blocks = layers.down_proj.weight.blocks if block else layers.down_proj.weight.base.blocks
    assert blocks.size == 3 * 32 * 64 * (1.125 if block else 1)
    ids = np.arange(48, dtype=np.int32).reshape(2, 24)
    expected, _ = run(mx.dequantize(loaded), ids)
    # Codes of FP8 are multiplied as floats: the error of float32.
    assert relative_error(run(loaded, ids)[0], expected) < 2e-5
    if stacked:
        split = mx.load(tmp_path, mesh=mx.make_mesh("ep=3"), strategy=mx.Strategy("experts@ep"))
        assert relative_error(eqx.filter_jit(split)(ids), expected) < 2e-5


EP = mx.Strategy("experts@ep")
SCHEMES = {
    "RTN": (mx.RTN(4, 32), "weight_packed", "INT4/32"),
    "RTN without zero points": (mx.RTN(3, 16, zero_point=False), "weight_packed", "INT3/16"),
    "Int8": (mx.Int8(), "weight_packed", "INT8"),
    "FP8": (mx.FP8(), "weight_scale", "FP8"),
    "FP8, one scale": (mx.FP8("tensor"), "weight_scale", "FP8"),
    "NF4": (mx.NF4(32), "weight.absmax", "NF4/32"),
}


@pytest.mark.parametrize("name", every_third(SCHEMES))
@pytest.mark.parametrize("latent", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quantized_experts_are_saved_one_by_one(name, latent, model, tmp_path):
    scheme, end, format = SCHEMES[name]
    if latent:
        sizes = mx.Latent(q_rank=32, kv_rank=32, nope_dim=16, rope_dim=16, value_dim=32)
        changed = {"embed": 64, "hidden": 64, "head_dim": 32, "latent": sizes}
        routing = dataclasses.replace(LATENT.routing, hidden=32)
        model = small_model(config=dataclasses.replace(LATENT, **changed, routing=routing))
    small = mx.quantize(model, scheme)
    mx.save(small, tmp_path)
    stem = "mlp.experts.2.down_proj" if latent else "block_sparse_moe.experts.2.w2"
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert f"model.layers.1.{stem}.{end}" in file.keys()  # noqa: SIM118
    again = mx.load(tmp_path)
    assert (formats(again), again.config) == ([format], small.config)
    down, expected = (one.blocks[1].feed_forward.down_proj.weight for one in (again, small))
    if name == "FP8, one scale":  # which each expert has in the file
        np.testing.assert_array_equal(down.dense(), expected.dense())
    else:
        assert_same(again, small)
    if name == "NF4":
        split = mx.load(tmp_path, mesh=mx.make_mesh("ep=2" if latent else "ep=3"), strategy=EP)
        np.testing.assert_array_equal(split.blocks[1].feed_forward.down_proj.weight.blocks, down.blocks)


def test_experts_beside_quantized_layers_keep_their_floats(model, tmp_path):
    """And experts may be quantized while the other layers are not."""
    for number, pattern in enumerate(("*.attention.*", "*.feed_forward.*")):
        small = mx.quantize(model, {pattern: mx.RTN(4, 32)})
        mx.save(small, tmp_path / str(number))
        assert_same(mx.load(tmp_path / str(number)), small)
        left_out = json.loads((tmp_path / str(number) / "config.json").read_text())["quantization_config"]["ignore"]
        assert ("model.layers.1.block_sparse_moe.experts.2.w3" in left_out) == (number == 0)
        assert "model.layers.0.block_sparse_moe.gate" in left_out


@pytest.mark.parametrize(
    "form",
    [
        quantized.gptq(4, 32),
        pytest.param(quantized.gptq(8, 16, act_order=True), marks=pytest.mark.slow),
        pytest.param(quantized.awq(16), marks=pytest.mark.slow),
        pytest.param(quantized.bnb_int8(), marks=pytest.mark.slow),
    ],
)
def test_published_experts_have_the_numbers_they_stand_for(form, model, tmp_path):
    """In Mixtral's names of linear layers, as tools before version 5 of transformers wrote them."""
    pack, config = form
    mx.save(model, tmp_path / "packed")
    mx.save(model, tmp_path / "plain")
    packed, plain = {}, {}
    for name, value in load_file(tmp_path / "packed" / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        packed[name] = plain[name] = value
        if ".experts." in name:
            del packed[name]
            parts, plain[name] = pack(value.astype(np.float32))
            plain[name] = np.ascontiguousarray(plain[name].astype(np.float32))
            packed |= {f"{stem}.{end}": np.ascontiguousarray(part) for end, part in parts.items()}
    save_file(packed, tmp_path / "packed" / "model.safetensors")
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    settings = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps({**settings, "quantization_config": config}))
    assert_same(mx.dequantize(mx.load(tmp_path / "packed")), mx.load(tmp_path / "plain"))


@pytest.mark.parametrize("routed", [True, False])
def test_fp8_releases_with_params(routed, tmp_path):
    """The codes and scales of a release, and the logits of the numbers that they stand for."""
    # Weights that are not quantized keep their precision.
    model = small_model(config=ROUTED) if routed else small_model(config=TINY, dtype="bfloat16")
    mx.save(model, tmp_path / "fp8", format="mistral")
    mx.save(model, tmp_path / "plain", format="mistral")
    tensors, plain = load_file(tmp_path / "fp8" / "consolidated.safetensors"), {}
    pack, found = quantized.fp8()[0], {}
    for name, value in tensors.items():
        stem = name.removesuffix(".weight")
        plain[name] = found[name] = value
        if ".w" in stem:
            parts, plain[name] = pack(value.astype(np.float32))
            found[name] = parts["weight"]
            scale = {"qscale_weight": parts["weight_scale_inv"], "qscale_act": np.float32(0.5)}
            found |= {f"{stem}.{end}": np.asarray(value) for end, value in scale.items()}
    found["layers.0.attention.wq.fake_quantizer.scale"] = np.ones((), np.float32)
    save_file(found, tmp_path / "fp8" / "consolidated.safetensors")
    save_file(plain, tmp_path / "plain" / "consolidated.safetensors")
    path = tmp_path / "fp8" / "params.json"
    quantization = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization": quantization}))
    loaded, ids = mx.load(tmp_path / "fp8"), np.arange(48, dtype=np.int32).reshape(2, 24)
    assert set(formats(loaded)) == ({"FP8"} if routed else {"FP8", "BF16"})
    expected, _ = run(mx.load(tmp_path / "plain", dtype="float32"), ids)
    assert relative_error(run(loaded, ids)[0], expected) < 2e-5
    found.pop("layers.1.attention.wo.qscale_weight")
    save_file(found, tmp_path / "fp8" / "consolidated.safetensors")
    with pytest.raises(mx.InputError, match=r"has no tensor 'layers\.1\.attention\.wo\.qscale_weight', which its"):
        mx.load(tmp_path / "fp8")


HF = hf.write_config(ROUTED)
PARAMS = mistral.write_config(ROUTED)


def test_configs():
    assert hf.read_config(HF) == mistral.read_config(PARAMS) == ROUTED
    assert (HF["model_type"], HF["num_local_experts"], HF["num_experts_per_tok"]) == ("mixtral", 3, 2)
    assert PARAMS["moe"] == {"num_experts": 3, "num_experts_per_tok": 2}
    # The defaults of transformers.
    absent = ("rope_theta", "rope_parameters", "rms_norm_eps", "num_local_experts", "num_experts_per_tok")
    defaults = hf.read_config({key: value for key, value in HF.items() if key not in absent})
    assert (defaults.rope_theta, defaults.norm_eps, defaults.routing) == (1e6, 1e-5, Routing(8, 2))
    ignored = {"router_aux_loss_coef": 0.02, "router_jitter_noise": 0.1, "output_router_logits": True}
    assert hf.read_config({**HF, **ignored}) == ROUTED
    assert hf.read_config(hf.write_config(TINY)).routing is None


METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 16,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 80,
    "llama.expert_count": 3,
    "llama.expert_used_count": 2,
}


@pytest.mark.parametrize(
    ("read", "settings", "sentence"),
    [
        (hf.read_config, {**HF, "num_experts_per_tok": 4}, "routes each token to 4 experts, but a layer has 3"),
        (
            hf.read_config,
            {**HF, "num_local_experts": 0},
            "num_local_experts of config.json is 0; it must be at least 1",
        ),
        (hf.read_config, {**HF, "model_type": "mistral"}, "sets num_local_experts to 3, which this package does not"),
        (mistral.read_config, {**PARAMS, "moe": {"num_experts": 3}}, "lacks the key num_experts_per_tok"),
        (mistral.read_config, {**PARAMS, "moe": {**PARAMS["moe"], "num_experts_per_tok": 4}}, "but a layer has 3"),
        (mistral.read_config, {**PARAMS, "moe": {**PARAMS["moe"], "num_shared_experts": 1}}, "sets num_shared_experts"),
        (gguf_dialect.read_config, {**METADATA, "llama.expert_used_count": 4}, "but a layer has 3"),
        (gguf_dialect.read_config, {**METADATA, "llama.expert_used_count": 0}, "only one of the number of experts"),
        (gguf_dialect.read_config, {**METADATA, "llama.expert_shared_count": 1}, "sets llama.expert_shared_count"),
    ],
)
def test_a_config_that_is_wrong_or_not_supported_is_refused(read, settings, sentence):
    with pytest.raises(mx.InputError) as error:
        read(settings)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_gguf_metadata():
    assert gguf_dialect.read_config(METADATA).routing == ROUTED.routing


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.gate.weight"),
            "has no tensor 'model.layers.1.block_sparse_moe.gate.weight'",
        ),
        (
            lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
            "has no tensor 'model.layers.1.block_sparse_moe.experts.2.w3.weight', but has those of other experts",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.block_sparse_moe.gate.weight": np.zeros((4, 32), np.float32)}
            ),
            "has shape (4, 32), but its config requires (3, 32)",
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.0.block_sparse_moe.experts.3.w1.weight": np.zeros((64, 32), np.float32)}
            ),
            "which a model with its config does not have",
        ),
    ],
)
def test_tensors_that_are_missing_or_wrong_are_refused(change, sentence, model, tmp_path):
    mx.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(mx.InputError) as error:
        mx.load(tmp_path)
    assert sentence in str(error.value)


def test_what_is_not_there_yet_is_refused(model, tmp_path):
    with pytest.raises(mx.InputError, match=r"has experts, whose weights Int8.* does not quantize, because it rounds"):
        mx.quantize(model, mx.Int8(activations="int8"))
    with pytest.raises(
        mx.InputError, match=r"gate_proj' has the format Q8_0, which no such file can hold; write it as"
    ):
        mx.save(mx.quantize(model, {"*.gate_proj": mx.GGUF("Q8_0")}), tmp_path / "small")
    with pytest.raises(mx.InputError, match="windows in only some layers, scaled queries, experts"):
        hf.write_config(dataclasses.replace(ROUTED, windows=(None, 8)))
