"""GGUF models that llama.cpp's splitter wrote into several files, `name-00001-of-00003.gguf` and so on."""

import re
from collections.abc import Sequence
from pathlib import Path


_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def first_shard(path: Path) -> Path:
    """The first file of the model of which this file is a shard, by its name; the file itself if it is none."""
    return shard_path(path, 1) or path


def shard_path(path: Path, number: int) -> Path | None:
    """The path of a shard of the same model, counted from 1; `None` if the name is not that of a shard."""
    match = _SHARD.fullmatch(path.name)
    return None if match is None else path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf")


def shard_count(path: Path) -> int:
    """The number of shards that the name of a file gives; 1 if the name is not that of a shard."""
    match = _SHARD.fullmatch(path.name)
    return 1 if match is None else int(match[3])


def gguf_models(files: Sequence[Path]) -> list[Path]:
    """The files of models in a folder: of shards, only the first."""
    return [file for file in files if first_shard(file) == file or first_shard(file) not in files]
