"""Weights in several safetensors files, with or without an index."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..checks import checked
from ..documents import read_json, shown
from ..errors import InputError
from .reader import LazyTensor
from .safetensors import read_header


def read_index(index: Path) -> dict[str, str]:
    """Reads the index that names the file of each tensor.

    **Arguments:**

    - `index`: the JSON file.

    **Returns:** the file name for each tensor name.

    **Raises:** `InputError` that names the index, if it is malformed or names a file outside its folder.
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
        # A name with a path separator could point outside the checkpoint.
        if os.path.basename(name) != name or not name.endswith(".safetensors") or not name.isprintable():
            raise InputError(
                f"{str(index)!r} names the file {shown(name)}, which is not in its folder or not a safetensors file; "
                "fetch the index again.",
                file=index,
                key=tensor,
            )
    return placed


def read_shards(index: Path, *, packed: bool = False) -> dict[str, LazyTensor]:
    """Reads the headers of the safetensors files that an index names.

    **Arguments:**

    - `index`: the JSON file that names the file of each tensor.
    - `packed`: as for `read_header`.

    **Returns:** all tensors by name.

    **Raises:** `InputError` if a file is missing, or lacks a tensor that the index places in it.
    """
    placed = read_index(index)
    files = dict.fromkeys(placed.values())
    for name in files:
        if not os.path.isfile(index.parent / name):
            raise InputError(
                f"{str(index)!r} names the file {shown(name)}, which is not in its folder; fetch it too.",
                file=index,
                key=name,
            )
    headers = {name: read_header(index.parent / name, packed=packed) for name in files}
    for tensor, name in placed.items():
        if tensor not in headers[name]:
            raise InputError(
                f"{str(index)!r} says that {name!r} holds the tensor {shown(tensor)}, but it does not; fetch both "
                "again.",
                file=index,
                key=tensor,
            )
    return _merge({index.parent / name: header for name, header in headers.items()})


def merge_files(files: Iterable[Path], *, packed: bool = False) -> dict[str, LazyTensor]:
    """Merges the tensors of several safetensors files; no name may occur twice. `packed` is as for `read_header`."""
    return _merge({file: read_header(file, packed=packed) for file in files})


def _merge(headers: dict[Path, dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
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
