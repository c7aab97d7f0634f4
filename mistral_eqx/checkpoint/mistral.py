"""Mistral release folders: `params.json`, and `consolidated` weights as safetensors or pickled by torch."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import Count, CountOrZero
from ..config import Base, Epsilon, Layers, MistralConfig, Routing, Size
from ..documents import read_json
from ..errors import InputError
from .files import merge_files, read_index, read_shards
from .pth import read_pickles
from .reader import Checkpoint, LazyTensor, main_dtype
from .settings import Settings, consistent_value, per_kv, read_routing
from .weight_files import WeightFiles, read_consistent


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
    return Checkpoint(folder, "mistral", config, main_dtype(tensors), tensors, metadata)


def find_weights(folder: Path) -> list[WeightFiles]:
    """The weights of a folder that have Mistral names: by an index, in other safetensors files, or in pickles."""
    found: list[WeightFiles] = []
    placed: set[str] = set()
    if (folder / INDEX).exists():
        placed = set(read_index(folder / INDEX).values())
    files = [file for file in sorted(folder.glob("consolidated*.safetensors")) if file.name not in placed]
    # If none of its files exists, the index is stale: a single file has replaced the shards.
    if placed and (not files or any((folder / name).exists() for name in placed)):
        found.append(WeightFiles(INDEX, "mistral", lambda _: read_shards(folder / INDEX)))
    if files:
        found.append(WeightFiles(files[0].name, "mistral", lambda _: _read_shards_without_index(folder, files)))
    pickles = sorted(folder.glob("consolidated*.pth"))
    if pickles:
        found.append(WeightFiles(pickles[0].name, "mistral", lambda config: _read_pickles(folder, pickles, config)))
    return found


def _read_shards_without_index(folder: Path, files: list[Path]) -> dict[str, LazyTensor]:
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
    return merge_files(files)


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
    layers = document.take("n_layers", Layers)
    heads = document.take("n_heads", Size)
    kv_heads = document.take("n_kv_heads", Size)
    rope_theta = document.take("rope_theta", Base | None, None)
    config = document.make(
        vocab=document.take("vocab_size", Size),
        embed=document.take("dim", Size),
        hidden=document.take("hidden_dim", Size),
        layers=layers,
        kv_heads=kv_heads,
        q_per_kv=per_kv(heads, kv_heads, document),
        head_dim=document.take("head_dim", Size),
        rope_theta=10000.0 if rope_theta is None else rope_theta,
        norm_eps=document.take("norm_eps", Epsilon),
        max_positions=consistent_value(
            {key: document.take(key, Count | None, None) for key in ("max_position_embeddings", "max_seq_len")},
            document,
            32768,
        ),
        windows=_windows(document, layers),
        tied=document.take("tied_embeddings", bool, False),
        bos_id=document.take("bos_id", CountOrZero | None, 1),
        eos_ids=document.ids("eos_ids", (2,)),
        routing=_routing(document),
    )
    document.refuse_rest(_WITHOUT_EFFECT)
    return config


def write_config(config: MistralConfig) -> dict[str, Any]:
    """Writes the `params.json` of a Mistral release.

    **Returns:** the JSON object. If layers have different windows, it has their shortest repeating pattern. It has the
    ids of the beginning-of-sequence and end-of-sequence tokens only if they differ from Mistral's.
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
    if config.routing is not None:
        settings["moe"] = {
            "num_experts": config.routing.experts,
            "num_experts_per_tok": config.routing.per_token,
        }
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
    return settings


def _routing(document: Settings) -> Routing | None:
    moe = document.take("moe", dict[str, Any] | None, None)
    if not moe:
        return None
    inner = Settings(moe, f"The table moe of {document.name}", None)
    routing = read_routing(
        inner, inner.take("num_experts", Size), inner.take("num_experts_per_tok", Size), "num_experts_per_tok"
    )
    inner.refuse_rest(frozenset())
    return routing


def _windows(document: Settings, layers: int) -> tuple[int | None, ...]:
    spellings = {}
    for key in ("sliding_window", "_sliding_window"):
        value = document.take(key, Count | list[Count | None] | None, None)
        spellings[key] = None if value is None else (value,) if isinstance(value, int) else tuple(value)
    pattern: Sequence[int | None] = consistent_value(spellings, document, (None,))
    if not pattern or layers % len(pattern):
        raise document.wrong(
            "sliding_window",
            f"{document.name} has a sliding_window pattern of {len(pattern)} layers, which does not divide the "
            f"{layers} layers of the model; give a pattern that does.",
        )
    return (*pattern,) * (layers // len(pattern))
