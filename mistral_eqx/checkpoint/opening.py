"""Which of the formats a folder or file has."""

import os
from pathlib import Path

from ..documents import to_path
from ..errors import InputError
from . import gguf, hf, mistral
from .reader import Checkpoint


# By this file a folder of adapters is known.
ADAPTER = "adapter_config.json"


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    **Arguments:**

    - `path`: a folder of Hugging Face, a folder as Mistral releases it, or a `.gguf` file. A folder that holds the
        same weights several times is opened as Hugging Face's, if it can be.

    **Returns:** the checkpoint's format, config and tensors.

    **Raises:** `InputError` that names the file or folder and says what is wrong with it.
    """
    path = to_path(path, "The path of the checkpoint")
    if path.is_file():
        if path.suffix in (".safetensors", ".json", ".pth", ".bin"):
            raise InputError(
                f"{str(path)!r} is a single file of a checkpoint; give the folder that holds it.", file=path
            )
        return gguf.open_gguf(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{str(path)!r} is neither a file nor a folder; give the path of a checkpoint.", file=path)
    if not path.is_dir():
        raise InputError(f"There is no file or folder {str(path)!r}; give the path of a checkpoint.", file=path)
    return _open_folder(path)


def _open_folder(folder: Path) -> Checkpoint:
    is_hf, is_mistral = (folder / hf.CONFIG).exists(), (folder / mistral.CONFIG).exists()
    files = sorted(folder.glob("*.gguf"))
    if (folder / ADAPTER).exists():
        beside = "beside a model" if is_hf or is_mistral or files else "and no model"
        raise InputError(
            f"The folder {str(folder)!r} holds adapters ({ADAPTER!r}) {beside}; give each a folder of its own, load "
            "the model alone, and put the adapters into it with load_lora.",
            file=folder / ADAPTER,
        )
    if is_hf or is_mistral:
        by_hf, by_mistral = hf.readings(folder), mistral.readings(folder)
        if is_hf and (by_hf or not (is_mistral and by_mistral)):
            return hf.open_hf(folder, by_hf, [*by_mistral, *gguf.readings(files)])
        return mistral.open_mistral(folder, by_mistral, [*by_hf, *gguf.readings(files)])
    if len(files) == 1:
        return gguf.open_gguf(files[0])
    if files:
        raise InputError(
            f"The folder {str(folder)!r} holds {len(files)} .gguf files; give the path of one of them.", file=folder
        )
    what = "has neither a config.json nor a params.json nor a .gguf file" if any(folder.iterdir()) else "is empty"
    raise InputError(
        f"The folder {str(folder)!r} {what}; give a folder with a model's config and weights.", file=folder
    )
