"""From one checkpoint to another, tokenizer and all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from jax.typing import DTypeLike

from .checkpoint import convert as convert_weights, locate, open_checkpoint
from .checkpoint.loading import Progress
from .checkpoint.staging import naming
from .checkpoint.writing import Format
from .errors import InputError
from .text import load_tokenizer
from .text.load import tokenizer_file
from .text.settings import FILES, GENERATION


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: Format,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    tokenizer: bool = True,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    type: str | None = None,
):
    """Writes a checkpoint in another format or dtype. The model is never in memory, only a few rows of it.

    The tokenizer goes along: its files are copied if they lie beside the weights, and one in a `.gguf` is written as
    [`mistral_eqx.text.AbstractTokenizer.save`][] does.

    **Arguments:**

    - `source`: what [`mistral_eqx.load`][] takes.
    - `target`, `format`, `max_shard_size`, `overwrite`: as for [`mistral_eqx.save`][].
    - `dtype`: of all weights; the source's main dtype unless given, and float32 for quantised files.
    - `tokenizer`: whether the tokenizer goes along, if the source has one. A GGUF file needs it.
    - `allow_nonfinite`: whether weights that are NaN or infinite, in the file or as `dtype`, are written too.
    - `type`: of the weights in a GGUF file, as for [`mistral_eqx.save`][].
    - `progress`: called after each tensor with the bytes read so far and those there are in all.

    **Raises:** `ValueError` that names what is wrong with the source, or if the target may not be written.
    """
    path = locate(source)
    if type is not None and format != "gguf":
        raise InputError(f"The type {type!r} is for GGUF files, and the format is {format!r}; leave one of them out.")
    if format == "gguf" and not tokenizer:
        raise InputError(
            "A GGUF file holds its tokenizer, which cannot be left out (tokenizer=False).", key="tokenizer"
        )
    convert_weights(
        path,
        target,
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        progress=progress,
        finish=tokenizer_writer(path) if tokenizer and format != "gguf" else None,
        type=type,
        tokenizer=load_tokenizer(path) if format == "gguf" else None,
    )


def tokenizer_writer(path: Path) -> Callable[[Path], None]:
    """A function that writes the tokenizer of the checkpoint at `path` into a folder.

    **Raises:** `ValueError` if the tokenizer of a `.gguf` file cannot be read.
    """
    checkpoint = open_checkpoint(path)
    kind = checkpoint.metadata.get("tokenizer.ggml.model", "none")
    # Converters write the word where they were told to leave the vocabulary out.
    if checkpoint.format == "gguf" and kind not in ("none", "no_vocab") and tokenizer_file(path) == checkpoint.path:
        try:
            return load_tokenizer(checkpoint.path).save
        except ValueError as error:
            remedy = "or leave the tokenizer out (tokenizer=False)."
            raise InputError(f"{str(error).rstrip('.')}, {remedy}") from error

    def copy(folder: Path):
        for pattern in (*FILES, GENERATION) if path.is_dir() else ():
            for file in path.glob(pattern):
                copied = folder / file.relative_to(path)
                with naming(copied):
                    copied.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, copied)

    return copy
