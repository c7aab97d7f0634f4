"""From a model, or from another checkpoint, to the files of a checkpoint."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from ..nn import Mistral
from . import hf, mistral, safetensors
from .finite import all_finite
from .hub import locate
from .loading import Progress, path_of, supported_dtype
from .names import TensorSpec, tensor_specs
from .opening import open_checkpoint
from .processes import on_all
from .reader import CHUNK_BYTES, DTYPES, read_rows
from .source import Source, file_order, sources
from .staging import expect_free, naming, staged


Format = Literal["hf", "mistral"]


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """What will be written: `chunks` are asked for when it is its turn."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def save(
    model: Mistral,
    path: str | os.PathLike[str],
    *,
    format: Format = "hf",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
):
    """Writes a model to a folder that other programs can read.

    Loading it gives every weight bit for bit. The tokenizer is no part of the model:
    [`mistral_eqx.text.AbstractTokenizer.save`][] writes it into the same folder.

    A model that is split over devices is put together one tensor at a time. If they belong to several processes, all
    of these call this, and the first one writes.

    **Arguments:**

    - `model`: a model with dense weights.
    - `path`: the folder. It appears when it is complete.
    - `format`: `"hf"` for `config.json` and `model.safetensors`, which transformers loads; `"mistral"` for
        `params.json` and `consolidated.safetensors`.
    - `max_shard_size`: the largest size of a file of weights, in bytes or such as `"500MB"` and `"2GiB"`; a model that
        needs several gets an index. A single tensor is never divided.
    - `overwrite`: whether a checkpoint that already stands there is replaced, with all its files, in one step: until
        the new one is complete, and after an error or a kill, the old one is there.
    - `allow_nonfinite`: whether weights that are NaN or infinite are written too; otherwise they are refused, since a
        training run that diverged, or a cast that overflowed, is most likely not what was to be saved.

    **Raises:** `ValueError` if the format has no place for one of the weights, one of them is not finite, or the folder
    may not or cannot be written.
    """
    config = model.config
    arrays = {
        path_of(keys): leaf
        for keys, leaf in jax.tree_util.tree_flatten_with_path(model)[0]
        if isinstance(leaf, jax.Array | np.ndarray)
    }
    order = list(tensor_specs(config))
    for spec in order:
        if spec.path not in arrays:
            raise InputError(
                f"The model has no dense weight {spec.path!r}, which its config asks for; merge its adapters and "
                "dequantise it before it is saved."
            )
        found = arrays[spec.path]
        if found.shape != spec.shape(config) or found.dtype not in DTYPES.values():
            raise InputError(
                f"The model's weight {spec.path!r} is {found.dtype} of shape {found.shape}, but its config asks for "
                f"{spec.shape(config)}, in {', '.join(DTYPES)}; cast it, or correct the config."
            )
    if surplus := sorted(set(arrays) - {spec.path for spec in order}):
        raise InputError(
            f"The model has a weight {surplus[0]!r}, for which a checkpoint has no place; merge its adapters and "
            "dequantise it before it is saved."
        )
    several = not all(isinstance(array, np.ndarray) or array.is_fully_addressable for array in arrays.values())
    waiting = {spec.path: arrays[spec.path] for spec in order}
    tensors = [_from_array(spec, waiting, config, format, allow_nonfinite) for spec in order]

    def write():
        with staged(path, overwrite=overwrite) as folder:
            _write(folder, config, tensors, format, max_shard_size)

    def take_part():
        try:
            if jax.process_index() == 0:
                write()
        finally:
            # The other processes give their parts of a tensor only together with this one, also if it cannot write.
            for name in tuple(waiting):
                _on_host(waiting.pop(name))

    if not several:
        write()
        return
    on_all("place to save to", lambda: jax.process_index() == 0 and expect_free(path, overwrite), several)
    on_all("saved checkpoint", take_part, several)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: Format,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
):
    """Writes config and weights of a checkpoint in another format or dtype; [`mistral_eqx.convert`][] has more.

    **Arguments:**

    - `source`: what [`mistral_eqx.load`][] takes.
    - `target`, `format`, `max_shard_size`, `overwrite`: as for [`mistral_eqx.save`][].
    - `dtype`: of all weights; the source's main dtype unless given, and float32 for quantised files.
    - `allow_nonfinite`: whether weights that are NaN or infinite, in the file or as `dtype`, are written too.
    - `progress`: called after each tensor with the bytes read so far and those there are in all.
    - `finish`: called with the folder that will be `target`, to put more into it before it appears.

    **Raises:** `ValueError` that names what is wrong with the source, or if the target may not be written.
    """
    checkpoint = open_checkpoint(locate(source))
    wanted = checkpoint.dtype if dtype is None else supported_dtype(dtype)
    found = sources(checkpoint)
    total, done = sum(part.tensor.nbytes for part in found), 0

    def report(nbytes: int):
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    tensors = [_from_source(part, wanted, format, report, checkpoint.path, allow_nonfinite) for part in found]
    with staged(target, overwrite=overwrite) as folder:
        _write(folder, checkpoint.config, tensors, format, max_shard_size)
        if finish is not None:
            finish(folder)


def _from_array(
    spec: TensorSpec,
    waiting: dict[str, jax.Array | np.ndarray],
    config: MistralConfig,
    format: Format,
    allow_nonfinite: bool,
) -> _Tensor:
    """The model's tensor, which is taken out of those that are `waiting` when it is its turn."""
    shape = spec.file_shape(config)

    def chunks() -> Iterator[np.ndarray]:
        flat = _on_host(waiting.pop(spec.path)).reshape(shape)
        for model_rows in _model_rows(spec, config, format, flat.dtype):
            chunk = flat[model_rows]
            if not allow_nonfinite and not all_finite(chunk):
                raise InputError(
                    f"The tensor {spec.name(format)!r} (the model's {spec.path!r}) holds NaN or infinity, so nothing was "
                    "saved; go back to a model from before it diverged, or write it as it is (allow_nonfinite=True).",
                    key=spec.name(format),
                )
            yield chunk

    return _Tensor(spec.name(format), shape, np.dtype(waiting[spec.path].dtype), chunks)


def _from_source(
    source: Source,
    dtype: np.dtype,
    format: Format,
    report: Callable[[int], None],
    path: Path,
    allow_nonfinite: bool,
) -> _Tensor:
    spec, config, tensor = source.spec, source.config, source.tensor

    def chunks() -> Iterator[np.ndarray]:
        order = file_order(spec, config, source.format)
        for model_rows in _model_rows(spec, config, format, dtype):
            rows = order[model_rows]
            with naming(path):
                chunk = read_rows(tensor, dtype, rows=rows)
            if not allow_nonfinite and not all_finite(chunk):
                overflows = dtype != tensor.dtype and all_finite(read_rows(tensor, tensor.dtype, rows=rows))
                wrong = f"has numbers that {dtype.name} cannot hold" if overflows else "holds NaN or infinity"
                remedy = "choose another dtype" if overflows else "fetch it again"
                raise InputError(
                    f"The tensor {tensor.name!r} of {str(path)!r} {wrong}, so nothing was written; {remedy}, or write "
                    "it as it is (allow_nonfinite=True).",
                    file=path,
                    key=tensor.name,
                )
            yield chunk
        report(tensor.nbytes)

    return _Tensor(spec.name(format), spec.file_shape(config), dtype, chunks)


def _model_rows(spec: TensorSpec, config: MistralConfig, format: Format, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The rows of the model's tensor in the order in which a file has them, a chunk at a time."""
    count, *width = spec.file_shape(config)
    order = np.argsort(file_order(spec, config, format))
    step = max(1, CHUNK_BYTES // (int(np.prod(width)) * dtype.itemsize))
    for start in range(0, count, step):
        yield order[start : start + step]


def _on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Puts an array together; all processes that have parts of it must call this."""
    if isinstance(array, np.ndarray):
        return array
    if array.is_fully_replicated:
        return _off_device(array.addressable_data(0))
    if not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    result = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            result[shard.index] = _off_device(shard.data)
    return result


def _off_device(array: jax.Array) -> np.ndarray:
    try:
        # An array keeps the numpy copy that is made of it, so make it of one that is dropped.
        return np.asarray(jax.device_put(array, jax.local_devices(backend="cpu")[0]))
    except RuntimeError:
        return np.asarray(array)


def _write(folder: Path, config: MistralConfig, tensors: list[_Tensor], format: Format, max_shard_size: int | str):
    """Writes the config and the weights, divided among as few files as the size allows."""
    shards = _shards(tensors, _bytes(max_shard_size))
    dtype = max({tensor.dtype for tensor in tensors}, key=lambda kind: _total(tensors, kind))
    if format == "hf":
        settings_file, settings = "config.json", {**hf.write_config(config), "torch_dtype": dtype.name}
        single, index = hf.WEIGHTS, hf.INDEX
    elif format == "mistral":
        settings_file, settings = "params.json", mistral.write_config(config)
        single, index = mistral.WEIGHTS, mistral.INDEX
    else:
        raise InputError(f"There is no format {format!r} to write; give 'hf' or 'mistral'.")
    _write_json(folder / settings_file, settings)
    stem = single.removesuffix(".safetensors")
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = single if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        placed |= {tensor.name: name for tensor in shard}
        described = [(tensor.name, tensor.shape, tensor.dtype, tensor.chunks()) for tensor in shard]
        with naming(folder / name):
            safetensors.write(folder / name, described)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors)
        _write_json(folder / index, {"metadata": {"total_size": size}, "weight_map": placed})


def _total(tensors: list[_Tensor], dtype: np.dtype) -> int:
    return sum(int(np.prod(tensor.shape)) for tensor in tensors if tensor.dtype == dtype)


def _write_json(path: Path, content: dict[str, Any]):
    with naming(path):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: list[_Tensor], limit: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)\s*", str(size), re.ASCII)
    count = 0 if match is None else int(Fraction(match[1]) * _UNITS.get(match[2].upper(), 0))
    if count < 1:
        raise InputError(
            f"The size {shown(size)} cannot be read; give bytes, or a number with a unit such as '5GB'.",
            key="max_shard_size",
        )
    return count
