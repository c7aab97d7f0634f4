"""Folders of Hugging Face: `config.json`, and safetensors in one file or in several with an index."""

from pathlib import Path

from ..config import MistralConfig
from ..errors import InputError
from .files import read_json, shards
from .reader import Checkpoint, main_dtype
from .safetensors import read_header


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def open_hf(folder: Path) -> Checkpoint:
    """Opens a folder of Hugging Face.

    **Arguments:**

    - `folder`: holds `config.json`, and `model.safetensors` or `model.safetensors.index.json`.

    **Returns:** the checkpoint.

    **Raises:** `ValueError` that names the file, if one is missing or cannot be read, or the key of a config that is
    not supported.
    """
    metadata = read_json(folder / "config.json")
    config = MistralConfig.from_hf(metadata, file=folder / "config.json")
    if (folder / INDEX).exists():
        tensors = shards(folder, folder / INDEX)
    elif (folder / WEIGHTS).exists():
        tensors = read_header(folder / WEIGHTS)
    else:
        pickled = sorted(folder.glob("pytorch_model*.bin"))
        found = f"only {pickled[0].name!r}, a pickle, which is not read" if pickled else "neither of them"
        raise InputError(
            f"The folder {str(folder)!r} has a config.json and should hold its weights in {WEIGHTS!r} or {INDEX!r}, "
            f"but has {found}; fetch or convert the weights as safetensors."
        )
    return Checkpoint(folder, "hf", config, main_dtype(tensors), tensors, metadata)
