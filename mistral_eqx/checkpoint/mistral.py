"""Mistral release folders: `params.json`, and `consolidated` weights as safetensors or pickled by torch."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import Count, CountOrZero
from ..config import Base, Epsilon, Latent, Layers, MistralConfig, Routing, Size
from ..documents import read_json
from ..errors import InputError
from ..rope import Factor, Magnitude, QueryScaling, Rotations, YarnScaling, yarn_magnitude
from .files import merge_files, read_index, read_shards
from .mixed import keep_16_bits
from .pth import read_pickles
from .quantized.float8 import FP8Weights
from .reader import DTYPES, Checkpoint, LazyTensor, main_dtype
from .settings import REQUIRED, Settings, consistent_value, per_kv, read_routing
from .weight_files import WeightFiles, read_consistent
from .wrapped import text_tensors, warn_of_skipped


CONFIG = "params.json"
WEIGHTS = "consolidated.safetensors"
INDEX = "consolidated.safetensors.index.json"
_NUMBERED_SHARD = re.compile(r"consolidated-(\d+)-of-(\d+)\.safetensors")
_NUMBERED_PICKLE = re.compile(r"consolidated\.(\d+)\.pth")


def open_mistral(folder: Path, own: Sequence[WeightFiles], others: Sequence[WeightFiles]) -> Checkpoint:
    """Opens a Mistral release folder.

    **Arguments:**

    - `folder`: the folder with `params.json`, and `consolidated.safetensors`, or several
        `consolidated-....safetensors` with or without an index, or `consolidated.00.pth` and so on, which need torch.
    - `own`: the result of `find_weights`.
    - `others`: weights in other formats in the same folder.

    **Returns:** the checkpoint.

    **Raises:** `InputError` that names the file, if a file is missing or cannot be read; that names the key, if the
    config is not supported; and that names two files, if the folder holds different weights in several formats.
    """
    metadata = read_json(folder / CONFIG)
    config = read_config(metadata, file=folder / CONFIG)
    if not own:
        raise InputError(
            f"The folder {str(folder)!r} has a params.json but no weights {WEIGHTS!r} or 'consolidated.00.pth'; "
            "fetch them too.",
            file=folder,
        )
    tensors = read_consistent(folder, config, [*own, *others])
    if metadata.get("vision_encoder"):
        warn_of_skipped(folder)
    dtype = main_dtype(tensors)
    if dtype == DTYPES["float32"] and any(tensor.packed is not None for tensor in tensors.values()):
        keep_16_bits(tensors)
    return Checkpoint(folder, "mistral", config, dtype, tensors, metadata)


def find_weights(folder: Path) -> list[WeightFiles]:
    """The weights of a folder that have Mistral names: by an index, in other safetensors files, or in pickles."""
    settings = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}

    def whole(read: Callable[[MistralConfig, bool], Mapping[str, LazyTensor]], file: str) -> WeightFiles:
        def tensors(config: MistralConfig) -> Mapping[str, LazyTensor]:
            quantization = _quantization(Settings(settings, "params.json", folder / CONFIG))
            found = read(config, quantization is not None)
            try:
                found = text_tensors(found, "mistral") if settings.get("vision_encoder") else found
                return found if quantization is None else quantization.combined(_without_quantizers(found))
            except InputError as error:
                raise InputError(f"{str(folder)!r} cannot be read: {error}", file=folder, key=error.key) from error

        return WeightFiles(file, "mistral", tensors)

    found: list[WeightFiles] = []
    placed: set[str] = set()
    if (folder / INDEX).exists():
        placed = set(read_index(folder / INDEX).values())
    files = [file for file in sorted(folder.glob("consolidated*.safetensors")) if file.name not in placed]
    # If none of its files exists, the index is stale: a single file has replaced the shards.
    if placed and (not files or any((folder / name).exists() for name in placed)):
        found.append(whole(lambda _, packed: read_shards(folder / INDEX, packed=packed), INDEX))
    if files:
        found.append(whole(lambda _, packed: _read_shards_without_index(folder, files, packed), files[0].name))
    pickles = sorted(folder.glob("consolidated*.pth"))
    if pickles:
        found.append(whole(lambda config, _: _read_pickles(folder, pickles, config), pickles[0].name))
    return found


def _without_quantizers(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors but for those of the quantizers of a training run."""
    return {name: tensor for name, tensor in tensors.items() if "fake_quantizer" not in name}


def _read_shards_without_index(folder: Path, files: list[Path], packed: bool) -> dict[str, LazyTensor]:
    """Reads shards, and uses the numbers in their names to detect a missing one."""
    numbers = [match for file in files if (match := _NUMBERED_SHARD.fullmatch(file.name))]
    for match in numbers[:1]:
        width, count = len(match[1]), int(match[2])
        for number in range(1, count + 1):
            name = f"consolidated-{number:0{width}}-of-{match[2]}.safetensors"
            if not (folder / name).exists():
                raise InputError(
                    f"The folder {str(folder)!r} lacks {name!r}, one of {count} files; fetch it too.", file=folder
                )
    return merge_files(files, packed=packed)


def _read_pickles(folder: Path, files: list[Path], config: MistralConfig) -> dict[str, LazyTensor]:
    numbers = sorted(int(match[1]) for file in files if (match := _NUMBERED_PICKLE.fullmatch(file.name)))
    for expected, number in enumerate(numbers):
        if number != expected:
            raise InputError(
                f"The folder {str(folder)!r} holds 'consolidated.{number:02}.pth' but lacks "
                f"'consolidated.{expected:02}.pth'; fetch it too.",
                file=folder,
            )
    return read_pickles(files, config)


_WITHOUT_EFFECT = frozenset({"max_batch_size"})
# How the experts were split in training.
_PARALLEL = frozenset({"expert_parallel", "expert_model_parallel"})

# The keys of latent attention, in the order of the fields of `Latent`.
_LATENT = {
    "q_lora_rank": "q_rank",
    "kv_lora_rank": "kv_rank",
    "qk_nope_head_dim": "nope_dim",
    "qk_rope_head_dim": "rope_dim",
    "v_head_dim": "value_dim",
}
# The keys of `moe` beside latent attention: the field of `Routing`, its type, and its default.
_MOE: Mapping[str, tuple[str, Any, Any]] = {
    "expert_hidden_dim": ("hidden", Size, REQUIRED),
    "num_shared_experts": ("shared", CountOrZero, 0),
    "first_k_dense_replace": ("first_dense", CountOrZero, 0),
    "num_expert_groups": ("groups", Size, 1),
    "num_expert_groups_per_tok": ("groups_per_token", Size, 1),
    "routed_scale": ("scale", Magnitude, 1.0),
}


def read_config(settings: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None) -> MistralConfig:
    """Reads the `params.json` of a Mistral release.

    As in Mistral's own code, a release without a context length has 32768 positions, and one without a rope base
    has 10000. The beginning-of-sequence and end-of-sequence tokens are 1 and 2, as in all of Mistral's tokenizers,
    unless `write_config` wrote other ids into the file.

    **Arguments:**

    - `settings`: the parsed JSON object.
    - `file`: the path of the file, for error messages.

    **Returns:** the config.

    **Raises:** `ValueError` that names the key, if a key is missing, has an invalid value, contradicts another key, or
    requires a computation that this package does not support.
    """
    document = Settings(settings, "params.json", file)
    document.expect("model_type", ("transformer", None), None)
    document.expect("activation", ("silu", None), None)
    document.expect("causal", (True, None), None)
    document.take("vision_encoder", dict[str, Any] | None, None)
    _quantization(document)
    layers = document.take("n_layers", Layers)
    heads = document.take("n_heads", Size)
    kv_heads = document.take("n_kv_heads", Size)
    rope_theta = document.take("rope_theta", Base | None, None)
    # Some releases have both, and the second one is the shorter limit of a server.
    lengths = [document.take(key, Count | None, None) for key in ("max_position_embeddings", "max_seq_len")]
    latent = _latent(document)
    width = () if latent is None else (latent.nope_dim + latent.rope_dim,)
    config = document.make(
        vocab=document.take("vocab_size", Size),
        embed=document.take("dim", Size),
        hidden=document.take("hidden_dim", Size),
        layers=layers,
        kv_heads=kv_heads,
        q_per_kv=per_kv(heads, kv_heads, document),
        head_dim=document.take("head_dim", Size, *width),
        rope_theta=10000.0 if rope_theta is None else rope_theta,
        norm_eps=document.take("norm_eps", Epsilon),
        max_positions=next(filter(None, lengths), 32768),
        windows=_windows(document, layers),
        tied=document.take("tied_embeddings", bool, False),
        bos_id=document.take("bos_id", CountOrZero | None, 1),
        eos_ids=document.ids("eos_ids", (2,)),
        rope_scaling=_yarn(document),
        query_scaling=_query_scaling(document),
        routing=_routing(document, latent, layers),
        latent=latent,
    )
    document.refuse_rest(_WITHOUT_EFFECT)
    return config


def write_config(config: MistralConfig) -> dict[str, Any]:
    """Writes the `params.json` of a Mistral release.

    **Returns:** the JSON object. If layers have different windows, it has their shortest repeating pattern. It has the
    ids of the beginning-of-sequence and end-of-sequence tokens only if they differ from Mistral's.

    **Raises:** `ValueError` if the rotary embedding is scaled in a way that the format cannot express.
    """
    settings: dict[str, Any] = {
        "dim": config.embed,
        "n_layers": config.layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.hidden,
        "n_heads": config.q_heads,
        "n_kv_heads": config.kv_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
    }
    settings |= _written_latent(config)
    if config.routing is not None:
        settings["moe"] = _written_routing(config, config.routing)
    pattern = next(
        config.windows[:length]
        for length in range(1, config.layers + 1)
        if config.layers % length == 0 and config.windows[:length] * (config.layers // length) == config.windows
    )
    if pattern != (None,):
        settings["sliding_window"] = pattern[0] if len(pattern) == 1 else list(pattern)
    if config.tied:
        settings["tied_embeddings"] = True
    if config.bos_id != 1:
        settings["bos_id"] = config.bos_id
    if config.eos_ids != (2,):
        settings["eos_ids"] = list(config.eos_ids)
    return {**settings, **_written_scaling(config)}


def _table(document: Settings, key: str) -> Settings | None:
    """The values of a table by names such as `yarn.factor`; `None` if the key has none."""
    values = document.take(key, dict[str, Any] | None, None)
    if not values:
        return None
    return Settings({f"{key}.{name}": value for name, value in values.items()}, document.name, document.file)


def _yarn(document: Settings) -> YarnScaling | None:
    table = _table(document, "yarn")
    if table is None:
        return None
    factor = table.take("yarn.factor", Factor)
    original = table.take("yarn.original_max_position_embeddings", Count)
    beta_fast, beta_slow = table.take("yarn.beta", Rotations, 32.0), table.take("yarn.alpha", Rotations, 1.0)
    magnitude = yarn_magnitude(factor) if table.take("yarn.apply_scale", bool, True) else 1.0
    table.refuse_rest(frozenset())
    return YarnScaling(factor, original, magnitude, beta_fast, beta_slow)


def _query_scaling(document: Settings) -> QueryScaling | None:
    table = _table(document, "llama_4_scaling")
    if table is None:
        return None
    original = table.take("llama_4_scaling.original_max_position_embeddings", Count)
    beta = table.take("llama_4_scaling.beta", Magnitude)
    table.refuse_rest(frozenset())
    return QueryScaling(beta, original)


def _written_scaling(config: MistralConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    queries = config.query_scaling
    match config.rope_scaling:
        case None:
            pass
        case YarnScaling(factor, original, magnitude, beta_fast, beta_slow, truncate=True) if magnitude in (
            1.0,
            yarn_magnitude(factor),
        ):
            settings["yarn"] = {
                "original_max_position_embeddings": original,
                "factor": factor,
                "apply_scale": magnitude != 1,
                "beta": beta_fast,
                "alpha": beta_slow,
            }
        case scaling:
            raise InputError(
                f"The rotary embedding has the scaling {scaling}, and params.json can hold YaRN alone, truncated, with "
                "its own magnitude or none; use the format 'hf'.",
                key="rope_scaling",
            )
    if queries is not None:
        settings["llama_4_scaling"] = {
            "original_max_position_embeddings": queries.original_positions,
            "beta": queries.beta,
        }
    return settings


def _latent(document: Settings) -> Latent | None:
    if document.take("kv_lora_rank", Size | None, None) is None:
        return None
    with document.naming():
        return Latent(*(document.take(key, Size) for key in _LATENT))


def _written_latent(config: MistralConfig) -> dict[str, Any]:
    if (latent := config.latent) is None:
        return {}
    if latent.eps != 1e-6 or latent.scale != 1:
        raise InputError(
            f"The latent attention has an eps of {latent.eps} and a scale of {latent.scale}, and params.json can hold "
            "1e-6 and 1 alone; use the format 'hf', which has some scales.",
            key="latent",
        )
    return {key: getattr(latent, field) for key, field in _LATENT.items()}


def _routing(document: Settings, latent: Latent | None, layers: int) -> Routing | None:
    moe = document.take("moe", dict[str, Any] | None, None)
    if not moe:
        return None
    inner = Settings(moe, f"The table moe of {document.name}", None)
    routing = read_routing(
        inner, inner.take("num_experts", Size), inner.take("num_experts_per_tok", Size), "num_experts_per_tok"
    )
    if latent is not None and routing is not None:
        inner.expect("route_every_n", (1,), 1)
        with inner.naming():
            more = {field: inner.take(key, kind, default) for key, (field, kind, default) in _MOE.items()}
            routing = dataclasses.replace(routing, **more)
    inner.refuse_rest(_PARALLEL)
    return None if routing is not None and routing.first_dense >= layers else routing


def _written_routing(config: MistralConfig, routing: Routing) -> dict[str, Any]:
    plain = {"num_experts": routing.experts, "num_experts_per_tok": routing.per_token}
    if not routing.normalized or (config.latent is None and routing != Routing(routing.experts, routing.per_token)):
        raise InputError(
            "params.json holds experts whose shares have the sum 1, and only beside latent attention groups, shared "
            "experts, dense layers and experts of their own width; use the format 'hf', which holds more.",
            key="routing",
        )
    if config.latent is None:
        return plain
    more = {key: getattr(routing, field) for key, (field, _, _) in _MOE.items()}
    return {**plain, "route_every_n": 1, **more, "expert_hidden_dim": config.expert_hidden}


def _quantization(document: Settings) -> FP8Weights | None:
    table = _table(document, "quantization")
    if table is None:
        return None
    table.expect("quantization.qformat_weight", ("fp8_e4m3",), None)
    # The scale of activations, given or not, is not used: activations are not rounded.
    table.expect("quantization.qscheme_act", ("TENSOR", "NO_SCALES", None), None)
    table.refuse_rest(frozenset())
    return FP8Weights(None, ("weight", "qscale_weight", "qscale_act"))


def _windows(document: Settings, layers: int) -> tuple[int | None, ...]:
    spellings = {}
    for key in ("sliding_window", "_sliding_window"):
        value = document.take(key, Any, None)
        # Some releases have the number as text.
        value = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value) else value
        value = document.checked(key, value, Count | list[Count | None] | None)
        spellings[key] = None if value is None else (value,) if isinstance(value, int) else tuple(value)
    pattern: Sequence[int | None] = consistent_value(spellings, document, (None,))
    if not pattern or layers % len(pattern):
        raise document.wrong(
            "sliding_window",
            f"{document.name} has a sliding_window pattern of {len(pattern)} layers, which does not divide the "
            f"{layers} layers of the model; give a pattern that does.",
        )
    return (*pattern,) * (layers // len(pattern))
