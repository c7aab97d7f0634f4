"""Folders of Hugging Face: `config.json`, and safetensors in one file or in several with an index."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..config import MistralConfig
from ..documents import read_json
from ..errors import InputError
from .files import indexed, merged, shards
from .reader import Checkpoint, main_dtype
from .readings import Reading, the_one
from .safetensors import read_header


CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def open_hf(folder: Path, own: Sequence[Reading], others: Sequence[Reading]) -> Checkpoint:
    """Opens a folder of Hugging Face.

    **Arguments:**

    - `folder`: holds `config.json`, and `model.safetensors` or `model.safetensors.index.json`.
    - `own`: what `readings` finds there.
    - `others`: weights in other formats that the folder holds too.

    **Returns:** the checkpoint.

    **Raises:** `InputError` that names the file, if one is missing or cannot be read, or the key of a config that is
    not supported; also if the folder holds weights several times, and they differ.
    """
    metadata = read_json(folder / CONFIG)
    config = MistralConfig.from_hf(metadata, file=folder / CONFIG)
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
    tensors = the_one(folder, config, [*own, *others])
    return Checkpoint(folder, "hf", config, main_dtype(tensors), tensors, metadata)


def readings(folder: Path) -> list[Reading]:
    """The ways to read the weights that have names of Hugging Face: by an index, and from a single file."""
    found: list[Reading] = []
    placed: set[str] = set()
    single = (folder / WEIGHTS).exists()
    if (folder / INDEX).exists():
        placed = set(indexed(folder / INDEX).values())
        # An index whose files are all gone was left behind by a checkpoint that a single file has replaced.
        if not single or any((folder / name).exists() for name in placed):
            found.append(Reading(INDEX, "hf", lambda _: shards(folder / INDEX)))
    if single and WEIGHTS not in placed:
        found.append(Reading(WEIGHTS, "hf", lambda _: read_header(folder / WEIGHTS)))
    loose = _loose(folder, placed)
    if found and loose:
        found.append(Reading(loose[0].name, "hf", lambda _: merged(loose)))
    return found


def _loose(folder: Path, placed: set[str]) -> list[Path]:
    """Shards that no index names."""
    return [file for file in sorted(folder.iterdir()) if _SHARD.fullmatch(file.name) and file.name not in placed]
