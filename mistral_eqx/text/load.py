"""Loads a tokenizer from a file or folder."""

import os
import re
from pathlib import Path

from ..checkpoint.gguf_shards import first_shard, gguf_models
from ..checkpoint.hub import locate
from ..errors import InputError
from .huggingface import read_tokenizer_json
from .sentencepiece import read_sentencepiece
from .tekken import TekkenTokenizer
from .tokenizer import AbstractTokenizer


_SENTENCEPIECE = re.compile(r"\.model(?:\.v(\d+)(?:m\d+)?)?$")
_KNOWN = "a tokenizer.json, a tekken.json, a tokenizer.model (or .model.v1, .v2, ...) or a .gguf"


def load_tokenizer(path: str | os.PathLike[str]) -> AbstractTokenizer:
    """Reads a tokenizer.

    **Arguments:**

    - `path`: a folder with a `tokenizer.json`, a `tekken.json`, a `tokenizer.model` or a single `.gguf` file (in this
        order of precedence), one of these files, or a name that [`mistral_eqx.checkpoint.locate`][] finds.

    **Returns:** the tokenizer, with the chat template and the special tokens of the settings files in its folder.

    **Raises:** `ValueError` if `path` does not exist, has no tokenizer of a known format, or is damaged.
    """
    path = tokenizer_file(locate(path))
    if not path.stat().st_size:
        raise InputError(f"{path} is empty; fetch it again.")
    if path.suffix.lower() == ".gguf":
        # Its library takes a second to import.
        from .gguf_vocabulary import read_gguf_tokenizer

        return read_gguf_tokenizer(first_shard(path))
    if path.suffix == ".json":
        return TekkenTokenizer(path) if "tekken" in path.name else read_tokenizer_json(path)
    if _SENTENCEPIECE.search(path.name):
        return read_sentencepiece(path)
    raise InputError(f"{path} does not have the name of a tokenizer file; give {_KNOWN}.")


def tokenizer_file(path: Path) -> Path:
    """The tokenizer file of a folder; any other path is returned unchanged.

    **Raises:** `ValueError` if the folder has no tokenizer file.
    """
    if not path.is_dir():
        return path
    folder = path
    for name in ("tokenizer.json", "tekken.json"):
        if (folder / name).is_file():
            return folder / name
    # Mistral may ship one vocabulary under several names. The version in the name is that of the chat format.
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    models = {file: match for file in files if (match := _SENTENCEPIECE.search(file.name))}
    ggufs = gguf_models([file for file in files if file.suffix.lower() == ".gguf"])
    if not models and len(ggufs) == 1:
        return ggufs[0]
    if not models:
        raise InputError(f"The folder {folder} has no tokenizer; add {_KNOWN}.")
    return max(models, key=lambda file: int(models[file][1] or 0))
