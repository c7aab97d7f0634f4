"""Folders as Mistral releases them: `params.json`, and `consolidated` weights as safetensors or pickled by torch."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..config import MistralConfig
from ..documents import read_json
from ..errors import InputError
from .files import indexed, merged, shards
from .pth import read_pickles
from .reader import Checkpoint, LazyTensor, main_dtype
from .readings import Reading, the_one


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
    config = MistralConfig.from_params_json(metadata, file=folder / CONFIG)
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
