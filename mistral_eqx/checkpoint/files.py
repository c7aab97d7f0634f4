"""What folders of weights have in common: an index of several weight files."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..checks import checked
from ..documents import read_json, shown
from ..errors import InputError
from .reader import LazyTensor
from .safetensors import read_header


def indexed(index: Path) -> dict[str, str]:
    """Reads which file each tensor is in.

    **Arguments:**

    - `index`: the JSON file that says so.

    **Returns:** names of files by names of tensors.

    **Raises:** `InputError` that names the index, if it says something else, or names what cannot be such a file.
    """
    placed = checked(
        read_json(index).get("weight_map"),
        dict[str, str],
        f"{str(index)!r} has no weight_map from tensors to files: it",
        file=index,
        key="weight_map",
        remedy="fetch it again",
    )
    if not placed:
        raise InputError(f"{str(index)!r} has an empty weight_map; fetch it again.", file=index, key="weight_map")
    for tensor, name in placed.items():
        # A name with a folder in it could lead out of the checkpoint.
        if os.path.basename(name) != name or not name.endswith(".safetensors") or not name.isprintable():
            raise InputError(
                f"{str(index)!r} names the file {shown(name)}, which is not in its folder or not a safetensors file; "
                "fetch the index again.",
                file=index,
                key=tensor,
            )
    return placed


def shards(index: Path) -> dict[str, LazyTensor]:
    """Reads which tensors several safetensors files hold together.

    **Arguments:**

    - `index`: the JSON file beside them that says which tensor is in which of them.

    **Returns:** all tensors by name.

    **Raises:** `InputError` if a file is absent, or holds other tensors than the index says.
    """
    placed = indexed(index)
    files = dict.fromkeys(placed.values())
    for name in files:
        if not os.path.isfile(index.parent / name):
            raise InputError(
                f"{str(index)!r} names the file {shown(name)}, which is not in its folder; fetch it too.",
                file=index,
                key=name,
            )
    headers = {name: read_header(index.parent / name) for name in files}
    for tensor, name in placed.items():
        if tensor not in headers[name]:
            raise InputError(
                f"{str(index)!r} says that {name!r} holds the tensor {shown(tensor)}, but it does not; fetch both "
                "again.",
                file=index,
                key=tensor,
            )
    return _merged({index.parent / name: header for name, header in headers.items()})


def merged(files: Iterable[Path]) -> dict[str, LazyTensor]:
    """The tensors of several safetensors files, each of which has names of its own."""
    return _merged({file: read_header(file) for file in files})


def _merged(headers: dict[Path, dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for file, header in headers.items():
        for name, tensor in header.items():
            if name in tensors:
                raise InputError(
                    f"{str(file)!r} holds the tensor {shown(name)}, which another file of that folder holds too; "
                    "remove the file that does not belong there.",
                    file=file,
                    key=name,
                )
            tensors[name] = tensor
    return tensors
