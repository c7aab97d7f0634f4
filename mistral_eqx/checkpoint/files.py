"""What folders of weights have in common: JSON files, and an index of several weight files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError
from .reader import LazyTensor
from .safetensors import read_header


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    **Raises:** `ValueError` that names the file, if it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{str(path)!r} is not JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} must hold a JSON object; fetch it again.")
    return content


def shards(folder: Path, index: Path) -> dict[str, LazyTensor]:
    """Reads which tensors several safetensors files hold together.

    **Arguments:**

    - `folder`: where they are.
    - `index`: the JSON file that says which tensor is in which of them.

    **Returns:** all tensors by name.

    **Raises:** `ValueError` if a file is absent, or holds other tensors than the index says.
    """
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise InputError(f"{str(index)!r} has no weight_map from tensors to files; fetch it again.")
    for name in dict.fromkeys(placed.values()):
        # A name with a folder in it could lead out of the checkpoint.
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{str(index)!r} names the file {name!r}, which is not in its folder; fetch it too.")
    tensors = merged(folder / name for name in dict.fromkeys(placed.values()))
    for name, file in placed.items():
        if name not in tensors:
            raise InputError(
                f"{str(index)!r} says that {file!r} holds the tensor {name!r}, but it does not; fetch both again."
            )
    return tensors


def merged(files: Iterable[Path]) -> dict[str, LazyTensor]:
    """The tensors of several safetensors files, each of which has names of its own."""
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise InputError(
                    f"{str(file)!r} holds the tensor {name!r}, which another file of that folder holds too; "
                    "remove the file that does not belong there."
                )
            tensors[name] = tensor
    return tensors
