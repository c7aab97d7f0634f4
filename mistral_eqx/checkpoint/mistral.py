"""Folders as Mistral releases them: `params.json`, and `consolidated` weights as safetensors or pickled by torch."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks import Count, CountOrZero
from ..config import Base, Epsilon, Layers, MistralConfig, Size
from ..documents import read_json
from ..errors import InputError
from .files import indexed, merged, shards
from .pth import read_pickles
from .reader import Checkpoint, LazyTensor, main_dtype
from .readings import Reading, the_one
from .settings import Settings, agreed, per_kv


CONFIG = "params.json"
WEIGHTS = "consolidated.safetensors"
INDEX = "consolidated.safetensors.index.json"
_OF = re.compile(r"consolidated-(\d+)-of-(\d+)\.safetensors")
_NUMBERED = re.compile(r"consolidated\.(\d+)\.pth")


def open_mistral(folder: Path, own: Sequence[Reading], others: Sequence[Reading]) -> Checkpoint:
    """Opens a folder as Mistral releases it.

    **Arguments:**

    - `folder`: holds `params.json`, and `consolidated.safetensors`, or several `consolidated-....safetensors` with or
        without an index, or `consolidated.00.pth` and so on, for which torch must be installed.
    - `own`: what `readings` finds there.
    - `others`: weights in other formats that the folder holds too.

    **Returns:** the checkpoint.

    **Raises:** `InputError` that names the file, if one is missing or cannot be read, or the key of a config that is
    not supported; also if the folder holds weights several times, and they differ.
    """
    metadata = read_json(folder / CONFIG)
    config = read_config(metadata, file=folder / CONFIG)
    if not own:
        raise InputError(
            f"The folder {str(folder)!r} has a params.json but no weights {WEIGHTS!r} or 'consolidated.00.pth'; "
            "fetch them too.",
            file=folder,
        )
    tensors = the_one(folder, config, [*own, *others])
    return Checkpoint(folder, "mistral", config, main_dtype(tensors), tensors, metadata)


def readings(folder: Path) -> list[Reading]:
    """The ways to read the weights that have names of Mistral: by an index, from other safetensors, from pickles."""
    found: list[Reading] = []
    placed: set[str] = set()
    if (folder / INDEX).exists():
        placed = set(indexed(folder / INDEX).values())
    files = [file for file in sorted(folder.glob("consolidated*.safetensors")) if file.name not in placed]
    # An index whose files are all gone was left behind by a checkpoint that a single file has replaced.
    if placed and (not files or any((folder / name).exists() for name in placed)):
        found.append(Reading(INDEX, "mistral", lambda _: shards(folder / INDEX)))
    if files:
        found.append(Reading(files[0].name, "mistral", lambda _: _all_of(folder, files)))
    pickles = sorted(folder.glob("consolidated*.pth"))
    if pickles:
        found.append(Reading(pickles[0].name, "mistral", lambda config: _unpickled(folder, pickles, config)))
    return found


def _all_of(folder: Path, files: list[Path]) -> dict[str, LazyTensor]:
    """Without an index, the names of the files are all that tells of one that is absent."""
    numbers = [match for file in files if (match := _OF.fullmatch(file.name))]
    for match in numbers[:1]:
        width, count = len(match[1]), int(match[2])
        for number in range(1, count + 1):
            name = f"consolidated-{number:0{width}}-of-{match[2]}.safetensors"
            if not (folder / name).exists():
                raise InputError(
                    f"The folder {str(folder)!r} lacks {name!r}, one of {count} files; fetch it too.", file=folder
                )
    return merged(files)


def _unpickled(folder: Path, files: list[Path], config: MistralConfig) -> dict[str, LazyTensor]:
    numbers = sorted(int(match[1]) for file in files if (match := _NUMBERED.fullmatch(file.name)))
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

    Releases that do not tell the longest context get 32768 positions, and those that do not tell the rope base
    10000, as in Mistral's own code. The tokens that start and end a text are 1 and 2, as in all its tokenizers,
    unless the file was written by `write_config` and says otherwise.

    **Arguments:**

    - `settings`: the parsed JSON object.
    - `file`: where it stands, for messages.

    **Returns:** the config.

    **Raises:** `ValueError` that names the key, if one is missing, has a value that it cannot have, contradicts
    another, or asks for a computation that this package does not do.
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
        max_positions=agreed(
            {key: document.take(key, Count | None, None) for key in ("max_position_embeddings", "max_seq_len")},
            document,
            32768,
        ),
        windows=_windows(document, layers),
        tied=document.take("tied_embeddings", bool, False),
        bos_id=document.take("bos_id", CountOrZero | None, 1),
        eos_ids=document.ids("eos_ids", (2,)),
    )
    document.refuse_rest(_WITHOUT_EFFECT)
    return config


def write_config(config: MistralConfig) -> dict[str, Any]:
    """Writes the `params.json` of a Mistral release.

    **Returns:** the JSON object. Windows that differ by layer are written as the shortest list that, repeated,
    gives them all. The tokens that start and end a text are written only if they are not Mistral's own.
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
    pattern = next(
        config.windows[:period]
        for period in range(1, config.layers + 1)
        if config.layers % period == 0 and config.windows[:period] * (config.layers // period) == config.windows
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


def _windows(document: Settings, layers: int) -> tuple[int | None, ...]:
    spellings = {}
    for key in ("sliding_window", "_sliding_window"):
        value = document.take(key, Count | list[Count | None] | None, None)
        spellings[key] = None if value is None else (value,) if isinstance(value, int) else tuple(value)
    pattern: Sequence[int | None] = agreed(spellings, document, (None,))
    if not pattern or layers % len(pattern):
        raise document.wrong(
            "sliding_window",
            f"{document.name} has a sliding_window pattern of {len(pattern)} layers, which does not divide the "
            f"{layers} layers of the model; give a pattern that does.",
        )
    return (*pattern,) * (layers // len(pattern))
