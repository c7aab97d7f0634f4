"""Which of the formats a folder or file has."""

import os

from ..documents import to_path
from ..errors import InputError
from .gguf import open_gguf
from .hf import INDEX, WEIGHTS, open_hf
from .mistral import has_weights, open_mistral
from .reader import Checkpoint


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    **Arguments:**

    - `path`: a folder of Hugging Face, a folder as Mistral releases it, or a `.gguf` file. A folder that holds the
        weights both ways is opened as Hugging Face's.

    **Returns:** the checkpoint's format, config and tensors.

    **Raises:** `ValueError` that names the file or folder and says what is wrong with it.
    """
    path = to_path(path, "The path of the checkpoint")
    if path.is_file():
        if path.suffix in (".safetensors", ".json", ".pth", ".bin"):
            raise InputError(f"{str(path)!r} is a single file of a checkpoint; give the folder that holds it.")
        return open_gguf(path)
    if not path.is_dir():
        raise InputError(f"There is no file or folder {str(path)!r}; give the path of a checkpoint.")
    hf, mistral = (path / "config.json").exists(), (path / "params.json").exists()
    hf_weights = (path / WEIGHTS).exists() or (path / INDEX).exists()
    if hf and (hf_weights or not (mistral and has_weights(path))):
        return open_hf(path)
    if mistral:
        return open_mistral(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return open_gguf(files[0])
    if files:
        raise InputError(f"The folder {str(path)!r} holds {len(files)} .gguf files; give the path of one of them.")
    what = "is empty" if not any(path.iterdir()) else "has neither a config.json nor a params.json nor a .gguf file"
    raise InputError(f"The folder {str(path)!r} {what}; give a folder with a model's config and weights.")
