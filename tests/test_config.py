import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from mistral_eqx.checkpoint import gguf, hf, mistral
from mistral_eqx.config import MistralConfig
from mistral_eqx.errors import InputError
from mistral_eqx.presets import PRESETS


HF_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}

HF_SMOLLM2 = {
    "_name_or_path": "somewhere",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}

PARAMS_7B = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}

GGUF_SMOLLM2 = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.name": "SmolLM2",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.vocab_size": 49152,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.tokens": ["a"] * 49152,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "general.quantization_version": 2,
}


@st.composite
def fields(draw):
    """What makes a config; made in the test, for the type checker draws random numbers of its own."""
    size = st.integers(1, 2**17)
    layers = draw(st.integers(1, 12))
    window = st.none() | st.just(draw(st.integers(1, 10**6)))
    return {
        "vocab": draw(size),
        "embed": draw(size),
        "hidden": draw(size),
        "layers": layers,
        "kv_heads": draw(st.integers(1, 16)),
        "q_per_kv": draw(st.integers(1, 8)),
        "head_dim": 2 * draw(st.integers(1, 128)),
        "rope_theta": draw(st.floats(1.0, 1e9)),
        "norm_eps": draw(st.floats(1e-8, 1e-3)),
        "max_positions": draw(size),
        "windows": tuple(draw(st.lists(window, min_size=layers, max_size=layers))),
        "tied": draw(st.booleans()),
        "bos_id": draw(st.none() | st.integers(0, 100)),
        "eos_ids": tuple(draw(st.lists(st.integers(0, 100), max_size=3, unique=True))),
    }


@given(fields())
def test_hf_round_trip(fields):
    config = MistralConfig(**fields)
    assert hf.read_config(json.loads(json.dumps(hf.write_config(config)))) == config


@given(fields(), st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=4))
def test_params_json_round_trip(fields, pattern):
    config = MistralConfig(**{**fields, "layers": 3 * len(pattern), "windows": tuple(pattern) * 3})
    settings = json.loads(json.dumps(mistral.write_config(config)))
    assert mistral.read_config(settings) == config
    written = settings.get("sliding_window")
    assert not isinstance(written, list) or len(written) <= len(pattern)


@given(st.floats(1.0, 1e9, width=32), st.floats(2**-30, 2**-10, width=32))
def test_gguf_keeps_every_float32(theta, eps):
    keys = {"llama.rope.freq_base": theta, "llama.attention.layer_norm_rms_epsilon": eps}
    config = gguf.read_config({**GGUF_SMOLLM2, **keys})
    assert np.float32(config.rope_theta) == np.float32(theta)
    assert np.float32(config.norm_eps) == np.float32(eps)


def test_published_configs_are_the_presets():
    assert hf.read_config(HF_7B) == PRESETS["7b-v0.1"]
    assert hf.read_config(HF_SMOLLM2) == PRESETS["smollm2-135m"]
    assert mistral.read_config(PARAMS_7B) == PRESETS["7b-v0.1"]
    assert gguf.read_config(GGUF_SMOLLM2, tied=True) == PRESETS["smollm2-135m"]


def test_published_parameter_counts():
    assert {name: config.parameters for name, config in PRESETS.items() if not name.startswith("gpt-")} == {
        "smollm2-135m": 134_515_008,
        "7b-v0.1": 7_241_732_096,
        "7b-v0.2": 7_241_732_096,
        "7b-v0.3": 7_248_023_552,
        "mathstral-7b": 7_248_023_552,
        "nemo-12b": 12_247_782_400,
        "small-3-24b": 23_572_403_200,
        "small-3.1-24b": 23_572_403_200,
        "large-2-123b": 122_610_069_504,
        "8x7b": 46_702_792_704,
        "8x22b": 140_630_071_296,
        "ministral-8b": 8_019_808_256,
        # Published as 3.4, 8.4 and 13.5 billions without the vision encoder.
        "ministral-3-3b": 3_429_006_336,
        "ministral-3-8b": 8_489_553_920,
        "ministral-3-14b": 13_506_073_600,
        "devstral-2-123b": 125_025_988_608,
        # Published as 119 billions, and as 673 billions of which 39 are active.
        "small-4-119b": 118_972_826_624,
        "large-3-675b": 673_421_089_792,
        "devstral-small-2-24b": 23_572_403_200,
        "medium-3.5-128b": 125_025_988_608,
        "voxtral-mini-3b": 4_014_136_320,
    }


def test_trap_default_that_hides_a_wrong_config():
    # mistral without the key has transformers' window of 4096; null means none; the rope base has its own default.
    absent = {key: value for key, value in HF_7B.items() if key not in ("sliding_window", "rope_theta")}
    assert set(hf.read_config(absent).windows) == {4096}
    assert hf.read_config(absent).rope_theta == 10000.0
    assert set(hf.read_config({**HF_7B, "sliding_window": None}).windows) == {None}
    # Wherever the rope base stands, it is found.
    for spelling in (
        {"rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 1000000, "rope_scaling": None},
        {"rope_scaling": {"type": "default", "rope_theta": 1e6}},
    ):
        assert hf.read_config({**absent, **spelling}).rope_theta == 1e6
    contradiction = {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    with pytest.raises(
        ValueError, match=r"rope_theta 10000\.0 and rope_parameters\.rope_theta 1000000\.0, which contr"
    ):
        hf.read_config({**absent, **contradiction})
    # What this package writes tells both, for old and new readers.
    written = hf.write_config(PRESETS["7b-v0.2"])
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6
    assert "sliding_window" in written
    assert written["sliding_window"] is None


def test_windows_that_alternate():
    settings = {**HF_7B, "model_type": "ministral", "num_hidden_layers": 4, "sliding_window": 7}
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "sliding_attention"]
    assert hf.read_config({**settings, "layer_types": kinds}).windows == (None, 7, 7, 7)
    assert hf.read_config(settings).windows == (7, 7, 7, 7)
    with pytest.raises(ValueError, match=r"has 4 layer_types for 5 layers"):
        hf.read_config({**settings, "num_hidden_layers": 5, "layer_types": kinds})
    with pytest.raises(ValueError, match=r"sliding_attention among its layer_types but no sliding_window"):
        hf.read_config({**settings, "sliding_window": None, "layer_types": kinds})
    with pytest.raises(ValueError, match=r"sets layer_types to 'chunked_attention'"):
        hf.read_config({**settings, "layer_types": ["chunked_attention"] * 4})
    for key in ("sliding_window", "_sliding_window"):
        params = {**PARAMS_7B, "n_layers": 8, "sliding_window": None, key: [None, 9, 9, 9]}
        assert mistral.read_config(params).windows == (None, 9, 9, 9) * 2
        assert mistral.read_config({**params, key: "4096"}).windows == (4096,) * 8
    with pytest.raises(ValueError, match=r"pattern of 3 layers, which does not divide the 8"):
        mistral.read_config({**PARAMS_7B, "n_layers": 8, "sliding_window": [None, 9, 9]})
    assert hf.read_config(hf.write_config(PRESETS["ministral-8b"])) == PRESETS["ministral-8b"]
    assert mistral.write_config(PRESETS["ministral-8b"])["sliding_window"] == [None, 32768, 32768, 32768]
    several = dataclasses.replace(PRESETS["gpt-nano"], windows=(4, 8, None))
    with pytest.raises(ValueError, match=r"windows of 4 and 8 positions, but config\.json can hold only one"):
        hf.write_config(several)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": None}, r"model_type None, which is not supported; the supported ones are"),
        ({"model_type": "mamba2"}, r"'mamba2', which is not supported because it has a state in place of attention;"),
        ({"model_type": "mistral_large4"}, r"'mistral_large4', which is not supported because of its sparse latent"),
        ({"architectures": ["MistralLarge4"]}, r"names the architecture 'MistralLarge4'"),
        ({"hidden_act": "gelu"}, r"has hidden_act 'gelu', which is not supported; supported is 'silu' and 'swish'"),
        ({"attention_bias": True}, r"sets attention_bias to True, which this package does not compute"),
        ({"mlp_bias": True}, r"sets mlp_bias to True"),
        ({"quantization_config": {"quant_method": "eetq"}}, r"has the quantization method 'eetq'"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            r"'dynamic' .* because its angles depend on the length of",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            r"supported ones are 'default', 'linear', 'llama3' and 'yarn'",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, r"sets rope_parameters to"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, r"sets rope_parameters\.factor to 2\.0"),
        ({"partial_rotary_factor": 0.5}, r"has partial_rotary_factor 0\.5, which is not supported"),
        ({"rope_interleaved": True}, r"sets rope_interleaved to True"),
        ({"final_logit_softcapping": 30.0}, r"sets final_logit_softcapping to 30\.0"),
        ({"use_sliding_window": False}, r"has a sliding_window of 4096 and use_sliding_window false"),
        ({"num_local_experts": 8}, r"sets num_local_experts to 8"),
        ({"num_attention_heads": 30, "head_dim": 128}, r"30 query heads and 8 key/value heads"),
        ({"num_attention_heads": 24, "head_dim": None}, r"width 4096 does not divide among 24 heads; add head_dim"),
        ({"vocab_size": "32000"}, r"vocab_size of config\.json is '32000'; it must be a whole number"),
        ({"hidden_size": 0, "head_dim": 128}, r"hidden_size of config\.json is 0; it must be at least 1"),
        ({"head_dim": 127}, r"head_dim is 127, but it must be even"),
        ({"tie_word_embeddings": 1}, r"tie_word_embeddings of config\.json is 1; it must be true or false"),
        ({"rope_theta": "big"}, r"rope_theta of config\.json is 'big'; it must be a number"),
        ({"sliding_window": 0}, r"sliding_window of config\.json is 0; it must be at least 1"),
    ],
)
def test_hf_refuses_by_name(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        hf.read_config({**HF_7B, **change})


def test_hf_refuses_a_window_of_llama():
    with pytest.raises(ValueError, match=r"sets sliding_window to 4096"):
        hf.read_config({**HF_SMOLLM2, "sliding_window": 4096})


def test_hf_ignores_what_has_no_effect():
    harmless = {"temperature": 0.3, "pad_token_id": 5, "_attn_implementation": "sdpa", "num_experts": 0, "new": None}
    assert hf.read_config({**HF_7B, **harmless}) == hf.read_config(HF_7B)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2, "route_every_n": 2}}, r"sets route_every_n to 2"),
        ({"lora": {"rank": 64}}, r"sets lora to"),
        ({"vision_encoder": 1024}, r"vision_encoder of params\.json is 1024; it must be a table"),
        (
            {"quantization": {"qformat_weight": "fp8"}},
            r"qformat_weight 'fp8', which is not supported; supported is 'fp8_e4m3'",
        ),
        ({"use_biases": True}, r"sets use_biases to True"),
        ({"model_type": "mamba"}, r"'mamba', which is not supported because it has a state in place of attention; sup"),
        ({"causal": False}, r"has causal False"),
        ({"_sliding_window": 8}, r"contradict each other"),
        ({"sliding_window": "wide"}, r"sliding_window of params\.json is 'wide'; it must be a whole number or a list"),
        ({"vocab_size": -1}, r"vocab_size of params\.json is -1; it must be at least 1"),
    ],
)
def test_params_json_refuses_by_name(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        mistral.read_config({**PARAMS_7B, **change})


def test_params_json_needs_its_sizes():
    for key in PARAMS_7B.keys() - {"sliding_window"}:
        with pytest.raises(ValueError, match=rf"lacks the key {key}, without which"):
            mistral.read_config({name: value for name, value in PARAMS_7B.items() if name != key})


def test_params_json_of_later_releases():
    later = {**PARAMS_7B, "sliding_window": None, "rope_theta": 1e6, "max_seq_len": 131072, "tied_embeddings": True}
    later |= {"model_type": "transformer", "use_biases": False, "max_batch_size": 0, "moe": None, "activation": "silu"}
    config = mistral.read_config(later)
    assert (config.rope_theta, config.max_positions, config.tied) == (1e6, 131072, True)
    assert set(config.windows) == {None}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"general.architecture": "qwen2"}, r"has general\.architecture 'qwen2', which is not supported"),
        ({"general.architecture": "mamba2"}, r"'mamba2', which is not supported because it has a state in place of"),
        ({"general.type": "adapter"}, r"has general\.type 'adapter'"),
        ({"split.count": 3}, r"is one of 3 shards; merge them first with llama\.cpp's llama-gguf-split --merge"),
        ({"llama.rope.scaling.type": "longrope"}, r"has llama\.rope\.scaling\.type 'longrope'"),
        ({"llama.rope.dimension_count": 32}, r"has llama\.rope\.dimension_count 32, which .* supported is 64"),
        ({"llama.attention.value_length": 32}, r"has llama\.attention\.value_length 32"),
        ({"llama.expert_count": 8}, r"only one of the number of experts and llama\.expert_used_count"),
        ({"llama.logit_scale": 0.5}, r"sets llama\.logit_scale to 0\.5"),
        ({"llama.attention.head_count": [9, 9]}, r"head_count of GGUF metadata is \[9, 9\]; it must be a whole number"),
    ],
)
def test_gguf_refuses_by_name(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        gguf.read_config({**GGUF_SMOLLM2, **change})


def test_gguf_derives_what_old_files_leave_out():
    short = {
        key: value for key, value in GGUF_SMOLLM2.items() if key not in ("llama.vocab_size", "llama.rope.freq_base")
    }
    config = gguf.read_config(short)
    assert (config.vocab, config.rope_theta, config.head_dim) == (49152, 10000.0, 64)
    nemo = {**GGUF_SMOLLM2, "llama.attention.key_length": 128, "llama.rope.dimension_count": 128}
    assert gguf.read_config({**nemo, "llama.attention.value_length": 128}).head_dim == 128
    assert set(gguf.read_config({**short, "llama.attention.sliding_window": 64}).windows) == {64}
    assert gguf.read_config({**short, "tokenizer.ggml.eot_token_id": 7}).eos_ids == (2, 7)
    for key in ("llama.block_count", "llama.context_length", "llama.attention.layer_norm_rms_epsilon"):
        with pytest.raises(ValueError, match=rf"lacks the key {key}"):
            gguf.read_config({name: value for name, value in GGUF_SMOLLM2.items() if name != key})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"windows": (None, None)}, r"has 2 windows for 3 layers; give one entry per layer"),
        ({"windows": (None, None, 0)}, r"windows is .*; its entry 2 must be at least 1"),
        ({"head_dim": 15}, r"head_dim is 15, but it must be even"),
        ({"layers": 0, "windows": ()}, r"layers is 0; it must be at least 1"),
        ({"rope_theta": float("nan")}, r"rope_theta is nan; it must be a finite number"),
        ({"norm_eps": 0.0}, r"norm_eps is 0\.0; it must be at least 1e-20"),
    ],
)
def test_config_refuses_impossible_sizes(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(PRESETS["gpt-nano"], **change)


HUGE = (2**63, 10**12, 10**400, float("nan"), float("inf"), 1e400, -1, 1.5, True, "text", [], [1], ["x"], {"a": 1})
SIZES = {
    "hf": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
    "intermediate_size max_position_embeddings rms_norm_eps rope_theta sliding_window tie_word_embeddings bos_token_id "
    "use_sliding_window layer_types model_type architectures rope_parameters",
    "mistral": "dim n_layers head_dim hidden_dim n_heads n_kv_heads norm_eps vocab_size rope_theta "
    "max_position_embeddings max_seq_len tied_embeddings bos_id model_type activation causal",
    "gguf": "llama.block_count llama.context_length llama.embedding_length llama.feed_forward_length "
    "llama.attention.head_count llama.attention.head_count_kv llama.rope.freq_base llama.vocab_size "
    "llama.attention.layer_norm_rms_epsilon llama.attention.key_length llama.attention.sliding_window "
    "llama.rope.dimension_count tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id general.architecture "
    "split.count",
}
ACCEPTED = {("rope_theta", 1.5), ("tie_word_embeddings", True), ("use_sliding_window", True), ("causal", True)}
ACCEPTED |= {("tied_embeddings", True), ("llama.rope.freq_base", 1.5)}
ACCEPTED |= {("rope_theta", 10**12), ("llama.rope.freq_base", 10**12)}
READERS = {"hf": hf.read_config, "mistral": mistral.read_config, "gguf": gguf.read_config}
BASES = {"hf": HF_7B, "mistral": PARAMS_7B, "gguf": GGUF_SMOLLM2}


@pytest.mark.parametrize(("reader", "key"), [(reader, key) for reader in SIZES for key in SIZES[reader].split()])
def test_what_a_key_cannot_be_is_refused_by_the_name_of_the_file_and_the_key(reader, key):
    for value in HUGE:
        settings = {**BASES[reader], key: value}
        if any(key == name and value is one for name, one in ACCEPTED) or (key, value) == ("architectures", []):
            READERS[reader](settings)
            continue
        with pytest.raises(InputError) as caught:
            READERS[reader](settings, file="folder/of.it")
        assert "'folder/of.it'" in str(caught.value)
        assert key in str(caught.value)
        assert len(str(caught.value)) < 400
        assert caught.value.file == "folder/of.it"


@pytest.mark.parametrize(
    ("reader", "change", "key"),
    [
        ("hf", {"num_key_value_heads": 0}, "num_key_value_heads"),
        ("hf", {"head_dim": 0}, "head_dim"),
        ("hf", {"rope_theta": 0}, "rope_theta"),
        ("hf", {"rope_theta": 1e-300}, "rope_theta"),
        ("hf", {"rms_norm_eps": 1e300}, "rms_norm_eps"),
        ("hf", {"use_sliding_window": "false"}, "use_sliding_window"),
        ("hf", {"partial_rotary_factor": True}, "partial_rotary_factor"),
        ("hf", {"is_causal": 1}, "is_causal"),
        ("hf", {"rope_parameters": []}, "rope_parameters"),
        ("hf", {"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta"),
        ("hf", {"rope_parameters": {"rope_type": ["default"]}}, "rope_parameters"),
        ("hf", {"eos_token_id": -1}, "eos_token_id"),
        ("hf", {"eos_token_id": [2, -1]}, "eos_token_id"),
        ("hf", {"eos_token_id": [[2]]}, "eos_token_id"),
        ("mistral", {"rope_theta": 0}, "rope_theta"),
        ("mistral", {"eos_ids": [2, True]}, "eos_ids"),
        ("mistral", {"causal": 1}, "causal"),
        ("mistral", {"sliding_window": [None, 0]}, "sliding_window"),
        ("gguf", {"tokenizer.ggml.eot_token_id": -1}, "eot_token_id"),
        ("gguf", {"llama.rope.scaling.factor": True}, "llama.rope.scaling.factor"),
    ],
)
def test_values_that_once_passed_for_others_are_refused(reader, change, key):
    with pytest.raises(InputError, match=re.escape(key)):
        READERS[reader]({**BASES[reader], **change})


def test_numbers_of_numpy_are_numbers():
    sizes = {"llama.block_count": np.uint32(30), "llama.rope.freq_base": np.float32(1e5)}
    assert gguf.read_config({**GGUF_SMOLLM2, **sizes}, tied=True) == PRESETS["smollm2-135m"]


@pytest.mark.parity
@pytest.mark.parametrize("model_type", ["mistral", "ministral", "ministral3", "llama"])
def test_absent_keys_have_the_defaults_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(model_type)
    config = hf.read_config({"model_type": model_type})
    assert config.vocab == theirs.vocab_size
    assert config.embed == theirs.hidden_size
    assert config.hidden == theirs.intermediate_size
    assert config.layers == theirs.num_hidden_layers
    assert config.kv_heads == theirs.num_key_value_heads
    assert config.q_heads == theirs.num_attention_heads
    assert config.head_dim == (theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config == hf.read_config(theirs.to_dict())
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.max_positions == theirs.max_position_embeddings
    assert set(config.windows) == {getattr(theirs, "sliding_window", None)}
    assert config.tied == theirs.tie_word_embeddings
    assert config.bos_id == theirs.bos_token_id
    assert config.eos_ids == (theirs.eos_token_id,)


@pytest.mark.parity
@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_what_is_written(name):
    transformers = pytest.importorskip("transformers")
    config = PRESETS[name]
    settings = hf.write_config(config)
    theirs = transformers.AutoConfig.for_model(**settings)
    assert hf.read_config(theirs.to_dict()) == config
    assert theirs.rope_parameters == settings["rope_parameters"]
