"""Opens a checkpoint in the format that its folder or file has."""

import os
from pathlib import Path

from ..documents import to_path
from ..errors import InputError
from . import hf, mistral
from .gguf_shards import gguf_models
from .reader import Checkpoint
from .weight_files import WeightFiles


# The file that marks a folder of adapters.
ADAPTER = "adapter_config.json"


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    **Arguments:**

    - `path`: a Hugging Face folder, a Mistral release folder, or a `.gguf` file. If a folder holds the same weights in
        several formats, the Hugging Face format has precedence.

    **Returns:** the checkpoint's format, config and tensors.

    **Raises:** `InputError` that names the file or folder and says what is wrong with it.
    """
    path = to_path(path, "The path of the checkpoint")
    if path.is_file():
        if path.suffix in (".safetensors", ".json", ".pth", ".bin"):
            raise InputError(
                f"{str(path)!r} is a single file of a checkpoint; give the folder that holds it.", file=path
            )
        return _open_gguf(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{str(path)!r} is neither a file nor a folder; give the path of a checkpoint.", file=path)
    if not path.is_dir():
        raise InputError(f"There is no file or folder {str(path)!r}; give the path of a checkpoint.", file=path)
    return _open_folder(path)


def _open_folder(folder: Path) -> Checkpoint:
    is_hf, is_mistral = (folder / hf.CONFIG).exists(), (folder / mistral.CONFIG).exists()
    files = gguf_models(sorted(folder.glob("*.gguf")))
    if (folder / ADAPTER).exists():
        beside = "beside a model" if is_hf or is_mistral or files else "and no model"
        raise InputError(
            f"The folder {str(folder)!r} holds adapters ({ADAPTER!r}) {beside}; give each a folder of its own, load "
            "the model, and add the adapters with load_lora.",
            file=folder / ADAPTER,
        )
    if is_hf or is_mistral:
        hf_weights, mistral_weights = hf.find_weights(folder), mistral.find_weights(folder)
        gguf_weights = _find_gguf(files) if files else []
        if is_hf and (hf_weights or not (is_mistral and mistral_weights)):
            return hf.open_hf(folder, hf_weights, [*mistral_weights, *gguf_weights])
        return mistral.open_mistral(folder, mistral_weights, [*hf_weights, *gguf_weights])
    if len(files) == 1:
        return _open_gguf(files[0])
    if files:
        raise InputError(
            f"The folder {str(folder)!r} holds {len(files)} .gguf files; give the path of one of them.", file=folder
        )
    reason = "has neither a config.json nor a params.json nor a .gguf file" if any(folder.iterdir()) else "is empty"
    raise InputError(
        f"The folder {str(folder)!r} {reason}; give a folder with a model's config and weights.", file=folder
    )


# The library gguf takes a second to import: only who has such a file waits for it.
def _open_gguf(path: Path) -> Checkpoint:
    from .gguf import open_gguf

    return open_gguf(path)


def _find_gguf(files: list[Path]) -> list[WeightFiles]:
    from .gguf import find_weights

    return find_weights(files)
