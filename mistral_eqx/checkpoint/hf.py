"""Hugging Face folders: `config.json`, and safetensors in one file or in several files with an index."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import Count, CountOrZero
from ..config import Epsilon, Latent, Layers, MistralConfig, Routing, Size
from ..documents import read_json, shown
from ..errors import InputError
from ..rope import Magnitude
from .files import merge_files, read_index, read_shards
from .hf_rope import read_rope, read_softmax_scale, write_rope
from .mixed import keep_16_bits
from .names import HEAD
from .quantized import read_quantization
from .reader import DTYPES, Checkpoint, LazyTensor, main_dtype
from .safetensors import read_header
from .settings import REASONS, Settings, consistent_value, listed, per_head, per_kv, read_routing
from .weight_files import WeightFiles, read_consistent
from .wrapped import WRAPPERS, is_wrapper, text_config, text_tensors, warn_of_skipped


CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def open_hf(folder: Path, own: Sequence[WeightFiles], others: Sequence[WeightFiles]) -> Checkpoint:
    """Opens a Hugging Face folder.

    **Arguments:**

    - `folder`: the folder with `config.json`, and `model.safetensors` or `model.safetensors.index.json`.
    - `own`: the result of `find_weights`.
    - `others`: weights in other formats in the same folder.

    **Returns:** the checkpoint.

    **Raises:** `InputError` that names the file, if a file is missing or cannot be read; that names the key, if the
    config is not supported; and that names two files, if the folder holds different weights in several formats.
    """
    metadata = read_json(folder / CONFIG)
    config = read_config(metadata, file=folder / CONFIG)
    if not own:
        pickled, loose = sorted(folder.glob("pytorch_model*.bin")), _loose(folder, set())
        found = "neither of them"
        if loose:
            found = f"only {loose[0].name!r}, a shard without that index"
        elif pickled:
            found = f"only {pickled[0].name!r}, a pickle, which is not read"
        raise InputError(
            f"The folder {str(folder)!r} has a config.json and should hold its weights in {WEIGHTS!r} or {INDEX!r}, "
            f"but has {found}; fetch or convert the weights as safetensors.",
            file=folder,
        )
    tensors = read_consistent(folder, config, [*own, *others])
    if is_wrapper(metadata):
        warn_of_skipped(folder)
        # The text model's own key comes first. The wrapper's default is true, so that the files decide.
        tied = HEAD.name("hf") not in tensors and metadata.get("tie_word_embeddings", True) is True
        config = dataclasses.replace(config, tied=config.tied or tied)
    dtype = main_dtype(tensors)
    if dtype == DTYPES["float32"] and any(tensor.packed is not None for tensor in tensors.values()):
        keep_16_bits(tensors)
    return Checkpoint(folder, "hf", config, dtype, tensors, metadata)


def find_weights(folder: Path) -> list[WeightFiles]:
    """The weights of a folder that have Hugging Face names: by an index, in a single file, or in loose shards."""
    content = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    settings = text_config(content, file=folder / CONFIG).get("quantization_config")
    found: list[WeightFiles] = []
    placed: set[str] = set()

    def whole(
        read: Callable[..., dict[str, LazyTensor]], source: Any
    ) -> Callable[[MistralConfig], dict[str, LazyTensor]]:
        def tensors(_: MistralConfig) -> dict[str, LazyTensor]:
            quantization = read_quantization(settings, file=folder / CONFIG)
            tensors = read(source, packed=quantization is not None)
            try:
                tensors = text_tensors(tensors, "hf") if is_wrapper(content) else tensors
                return tensors if quantization is None else quantization.combined(tensors)
            except InputError as error:
                raise InputError(f"{str(folder)!r} cannot be read: {error}", file=folder, key=error.key) from error

        return tensors

    single = (folder / WEIGHTS).exists()
    if (folder / INDEX).exists():
        placed = set(read_index(folder / INDEX).values())
        # If none of its files exists, the index is stale: a single file has replaced the shards.
        if not single or any((folder / name).exists() for name in placed):
            found.append(WeightFiles(INDEX, "hf", whole(read_shards, folder / INDEX)))
    if single and WEIGHTS not in placed:
        found.append(WeightFiles(WEIGHTS, "hf", whole(read_header, folder / WEIGHTS)))
    loose = _loose(folder, placed)
    if found and loose:
        found.append(WeightFiles(loose[0].name, "hf", whole(merge_files, loose)))
    return found


def _loose(folder: Path, placed: set[str]) -> list[Path]:
    """The shards that the index does not name."""
    return [file for file in sorted(folder.iterdir()) if _SHARD.fullmatch(file.name) and file.name not in placed]


_ARCHITECTURES = (
    "MistralForCausalLM",
    "MinistralForCausalLM",
    "Ministral3ForCausalLM",
    "MixtralForCausalLM",
    "Mistral4ForCausalLM",
    "LlamaForCausalLM",
)

# The defaults of transformers for missing keys that differ between its model types; a type without `sliding_window` has
# no windows.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "llama": {
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "ministral3": {
        "vocab_size": 131072,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
}
_DEFAULTS["mixtral"] = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
_DEFAULTS["mistral4"] = {
    "vocab_size": 131072,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_key_value_heads": None,
    "max_position_embeddings": 1048576,
    "n_routed_experts": 128,
    "num_experts_per_tok": 4,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 128.0,
        "original_max_position_embeddings": 8192,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
_DEFAULTS["ministral"] = _DEFAULTS["mistral"]

# Why other types of the family are refused.
_REASONS = {
    **REASONS,
    "mistral_large4": " because of its sparse latent attention",
}

# Keys that do not change the logits of a forward pass: bookkeeping, training, sampling, outputs.
_WITHOUT_EFFECT = frozenset(
    """
    transformers_version transformers.js_config torch_dtype dtype use_cache initializer_range attention_dropout
    pretraining_tp pad_token_id sep_token_id unk_token_id decoder_start_token_id id2label label2id num_labels
    problem_type return_dict return_dict_in_generate output_attentions output_hidden_states output_scores
    output_router_logits chunk_size_feed_forward is_decoder is_llama_config model_max_length tokenizer_class
    prefix finetuning_task task_specific_params bos_token eos_token pad_token license max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    router_aux_loss_coef router_jitter_noise
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_fixed unsloth_version
    """.split()  # noqa: SIM905
)


def read_config(settings: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None) -> MistralConfig:
    """Reads a Hugging Face `config.json` of model type `mistral`, `ministral`, `ministral3`, `mistral4`, `mixtral` or
    `llama`, or of the wrapping types `mistral3` and `voxtral` with such a `text_config`.

    A missing key gets the default of that model type in transformers. For example, a `mistral` config without the key
    `sliding_window` has a window of 4096, and a config with `"sliding_window": null` has no window.

    **Arguments:**

    - `settings`: the parsed JSON object.
    - `file`: the path of the file, for error messages.

    **Returns:** the config.

    **Raises:** `ValueError` that names the key, if a key is missing, has an invalid value, contradicts another key, or
    requires a computation that this package does not support.
    """
    document = Settings(text_config(settings, file=file), "config.json", file)
    model_type = document.take("model_type", str | None, None)
    if model_type not in _DEFAULTS:
        raise document.wrong(
            "model_type",
            f"{document.name} has model_type {shown(model_type)}, which is not supported"
            f"{_REASONS.get(model_type or '', '')}; the supported ones are {listed([*_DEFAULTS, *WRAPPERS])}.",
        )
    for architecture in document.take("architectures", list[str] | None, None) or ():
        if architecture not in _ARCHITECTURES:
            raise document.wrong(
                "architectures",
                f"{document.name} names the architecture {shown(architecture)} in architectures, which is not "
                f"supported; the supported ones are {listed(_ARCHITECTURES)}.",
            )
    defaults = _DEFAULTS[model_type]
    embed = document.take("hidden_size", Size, 4096)
    layers = document.take("num_hidden_layers", Layers, defaults.get("num_hidden_layers", 32))
    heads = document.take("num_attention_heads", Size, 32)
    kv_heads = document.take("num_key_value_heads", Size | None, defaults["num_key_value_heads"]) or heads
    latent = _latent(document) if model_type == "mistral4" else None
    width = defaults.get("head_dim") if latent is None else latent.nope_dim + latent.rope_dim
    head_dim = document.take("head_dim", Size | None, width) or per_head(embed, heads, document)
    max_positions = document.take("max_position_embeddings", Count, defaults["max_position_embeddings"])
    document.expect("hidden_act", ("silu", "swish"), "silu")
    rotated = 1.0 if latent is None else latent.rope_dim / head_dim
    document.expect("partial_rotary_factor", (rotated, None), None, float | None)
    for key in ("torch_dtype", "dtype"):  # each tensor stores its own dtype
        document.take(key, str | None, None)
    document.expect("is_causal", (True, None), None)
    read_quantization(document.take("quantization_config", dict[str, Any] | None, None), file=file)
    routing = _routing(document, defaults) if latent is None else _groups(document, defaults, layers)
    config = document.make(
        vocab=document.take("vocab_size", Size, defaults.get("vocab_size", 32000)),
        embed=embed,
        hidden=document.take("intermediate_size", Size, defaults["intermediate_size"]),
        layers=layers,
        kv_heads=kv_heads,
        q_per_kv=per_kv(heads, kv_heads, document),
        head_dim=head_dim,
        norm_eps=document.take("rms_norm_eps", Epsilon, defaults.get("rms_norm_eps", 1e-6)),
        max_positions=max_positions,
        windows=_windows(document, layers, defaults),
        tied=document.take("tie_word_embeddings", bool, False),
        bos_id=document.take("bos_token_id", CountOrZero | None, 1),
        eos_ids=document.ids("eos_token_id", (2,)),
        **read_rope(
            document,
            max_positions,
            absent=defaults.get("rope_parameters"),
            scales_queries=model_type in ("ministral3", "mistral4"),
            rotated=rotated,
        ),
        routing=routing,
        latent=latent,
    )
    document.refuse_rest(_WITHOUT_EFFECT)
    return config


def write_config(config: MistralConfig) -> dict[str, Any]:
    """Writes a Hugging Face `config.json`.

    **Returns:** the JSON object, of model type `mistral`, `ministral` if only some layers have a window,
    `ministral3` if queries are scaled, `mixtral` if the model has experts, or `mistral4` if it has latent attention.

    **Raises:** `ValueError` if the format cannot express the config: windows of several sizes, a combination for which
    there is no model type, or another scaling of the rotary embedding.
    """
    sizes = {window for window in config.windows if window is not None}
    if len(sizes) > 1:
        raise InputError(
            f"The layers have windows of {listed(sorted(sizes))} positions, but config.json can hold only one "
            "size; use the format 'mistral'."
        )
    alternating = None in config.windows and bool(sizes)
    routing, latent = config.routing, config.latent
    if latent is None and routing is not None and routing != Routing(routing.experts, routing.per_token):
        raise InputError(
            "config.json has no model type for grouped-query attention with experts in groups, shared experts, dense "
            "layers or experts of their own width; no format holds this model.",
            key="routing",
        )
    special = [
        kind
        for kind, has in (
            ("ministral", alternating),
            ("ministral3", config.query_scaling is not None),
            ("mixtral", config.routing is not None),
        )
        if has
    ]
    if latent is None and len(special) > 1:
        raise InputError(
            "config.json has no model type for more than one of these: windows in only some layers, scaled queries, "
            "experts; use the format 'mistral'."
        )
    model_type = "mistral4" if latent is not None else special[0] if special else "mistral"
    settings: dict[str, Any] = {
        "architectures": [f"{model_type.capitalize()}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.embed,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        **write_rope(config),
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "sliding_window": next(iter(sizes), None),
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if alternating:
        settings["layer_types"] = [
            "full_attention" if window is None else "sliding_attention" for window in config.windows
        ]
    if latent is not None:
        del settings["sliding_window"]
        return settings | _written_latent(config, latent)
    if routing is not None:
        settings |= {"num_local_experts": routing.experts, "num_experts_per_tok": routing.per_token}
    return settings


def _latent(document: Settings) -> Latent:
    """The sizes of the attention of type `mistral4`."""
    document.expect("rope_interleave", (True, None), True)
    q_rank = document.take("q_lora_rank", Size | None, 1024)
    if q_rank is None:
        raise document.refuse("q_lora_rank", None)
    nope, rope = document.take("qk_nope_head_dim", Size, 64), document.take("qk_rope_head_dim", Size, 64)
    document.expect("qk_head_dim", (nope + rope, None), None)
    with document.naming():
        return Latent(
            q_rank=q_rank,
            kv_rank=document.take("kv_lora_rank", Size, 256),
            nope_dim=nope,
            rope_dim=rope,
            value_dim=document.take("v_head_dim", Size, 128),
            scale=read_softmax_scale(document),
        )


def _groups(document: Settings, defaults: Mapping[str, Any], layers: int) -> Routing | None:
    """The experts of type `mistral4`; `None` if all layers are dense."""
    names = "n_routed_experts", "num_local_experts"
    found = {name: document.take(name, Size | None, None) for name in names}
    experts = consistent_value(found, document, defaults["n_routed_experts"])
    normalized = document.take("norm_topk_prob", bool | None, True)
    with document.naming():
        routing = Routing(
            experts=experts,
            per_token=document.take("num_experts_per_tok", Size, defaults["num_experts_per_tok"]),
            hidden=document.take("moe_intermediate_size", Size, 2048),
            shared=document.take("n_shared_experts", Size, 1),
            first_dense=document.take("first_k_dense_replace", CountOrZero | None, 0) or 0,
            groups=document.take("n_group", Size | None, 1) or 1,
            groups_per_token=document.take("topk_group", Size | None, 1) or 1,
            scale=document.take("routed_scaling_factor", Magnitude, 1.0),
            normalized=bool(normalized),
        )
    return None if routing.first_dense >= layers else routing


def _written_latent(config: MistralConfig, latent: Latent) -> dict[str, Any]:
    """The keys of type `mistral4`."""
    if latent.eps != 1e-6:
        raise InputError(
            f"The norms of the latent attention have an eps of {latent.eps}, and config.json can hold 1e-6 alone; no "
            "format holds this model.",
            key="eps",
        )
    # A model without experts is one whose layers are all dense.
    routing = config.routing or Routing(1, 1, hidden=config.hidden, shared=1, first_dense=config.layers)
    if not routing.shared:
        raise InputError(
            "config.json has no model type for latent attention and experts of which none is shared; use the format "
            "'mistral'.",
            key="routing",
        )
    return {
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "rope_interleave": True,
        "n_routed_experts": routing.experts,
        "num_experts_per_tok": routing.per_token,
        "moe_intermediate_size": routing.hidden or config.hidden,
        "n_shared_experts": routing.shared,
        "first_k_dense_replace": routing.first_dense,
        "n_group": routing.groups,
        "topk_group": routing.groups_per_token,
        "routed_scaling_factor": routing.scale,
        "norm_topk_prob": routing.normalized,
    }


def _routing(document: Settings, defaults: Mapping[str, Any]) -> Routing | None:
    if "num_local_experts" not in defaults:
        return None
    experts, per_token = (
        document.take(key, Size, defaults[key]) for key in ("num_local_experts", "num_experts_per_tok")
    )
    return read_routing(document, experts, per_token, "num_experts_per_tok")


def _windows(document: Settings, layers: int, defaults: Mapping[str, Any]) -> tuple[int | None, ...]:
    # A llama model has no window. Its key stays untaken, so that `refuse_rest` refuses a value.
    windowed = "sliding_window" in defaults
    window = document.take("sliding_window", Count | None, defaults["sliding_window"]) if windowed else None
    if document.take("use_sliding_window", bool | None, None) is False and window is not None:
        raise document.wrong(
            "use_sliding_window",
            f"{document.name} has a sliding_window of {window} and use_sliding_window false, and programs disagree "
            "about which key to use; set sliding_window to null, or remove use_sliding_window.",
        )
    kinds = document.take("layer_types", list[str] | None, None)
    if kinds is None:
        return (window,) * layers
    if len(kinds) != layers:
        raise document.wrong(
            "layer_types",
            f"{document.name} has {len(kinds)} layer_types for {layers} layers (num_hidden_layers); give one for each "
            "layer.",
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise document.refuse("layer_types", kind)
        if kind == "sliding_attention" and window is None:
            raise document.wrong(
                "sliding_window",
                f"{document.name} has sliding_attention among its layer_types but no sliding_window; add its size.",
            )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
