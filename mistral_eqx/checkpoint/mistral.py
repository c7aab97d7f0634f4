"""Folders as Mistral releases them: `params.json`, and `consolidated` weights as safetensors or pickled by torch."""

import re
from pathlib import Path

from ..config import MistralConfig
from ..errors import InputError
from .files import merged, read_json, shards
from .pth import read_pickles
from .reader import Checkpoint, LazyTensor, main_dtype


WEIGHTS = "consolidated.safetensors"
INDEX = "consolidated.safetensors.index.json"
_OF = re.compile(r"consolidated-(\d+)-of-(\d+)\.safetensors")


def open_mistral(folder: Path) -> Checkpoint:
    """Opens a folder as Mistral releases it.

    **Arguments:**

    - `folder`: holds `params.json`, and `consolidated.safetensors`, or several `consolidated-....safetensors` with or
        without an index, or `consolidated.00.pth` and so on, for which torch must be installed.

    **Returns:** the checkpoint.

    **Raises:** `ValueError` that names the file, if one is missing or cannot be read, or the key of a config that is
    not supported.
    """
    metadata = read_json(folder / "params.json")
    config = MistralConfig.from_params_json(metadata, file=folder / "params.json")
    tensors = _tensors(folder, config)
    return Checkpoint(folder, "mistral", config, main_dtype(tensors), tensors, metadata)


def has_weights(folder: Path) -> bool:
    """Whether there are weights under names that Mistral gives them."""
    return any(folder.glob("consolidated*.safetensors")) or any(folder.glob("consolidated*.pth"))


def _tensors(folder: Path, config: MistralConfig) -> dict[str, LazyTensor]:
    if (folder / INDEX).exists():
        return shards(folder, folder / INDEX)
    files = sorted(folder.glob("consolidated*.safetensors"))
    if files:
        _expect_all(folder, files)
        return merged(files)
    pickles = sorted(folder.glob("consolidated*.pth"))
    if pickles:
        return read_pickles(pickles, config)
    raise InputError(
        f"The folder {str(folder)!r} has a params.json but no weights {WEIGHTS!r} or 'consolidated.00.pth'; "
        "fetch them too."
    )


def _expect_all(folder: Path, files: list[Path]):
    """Without an index, the names of the files are all that tells of one that is absent."""
    numbers = [match for file in files if (match := _OF.fullmatch(file.name))]
    for match in numbers[:1]:
        width, count = len(match[1]), int(match[2])
        for number in range(1, count + 1):
            name = f"consolidated-{number:0{width}}-of-{match[2]}.safetensors"
            if not (folder / name).exists():
                raise InputError(f"The folder {str(folder)!r} lacks {name!r}, one of {count} files; fetch it too.")
