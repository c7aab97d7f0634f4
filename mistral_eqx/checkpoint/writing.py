"""Writes the files of a checkpoint, from a model or from another checkpoint."""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
from ..nn import DenseWeight, Mistral
from ..nn.block import check_whole
from ..quant import FORMATS, GGUF, QUANTIZED, BlockWeight
from . import hf, mistral, safetensors
from .finite import all_finite
from .gguf_writing import AbstractWeights, Vocabulary, chosen_types, write_gguf
from .hf_packed import Packing, float_blocks, packings, rows_of_blocks, whole_config
from .hub import locate
from .loading import Progress, is_weight, layer_path, supported_dtype
from .names import EMBEDDING, LayerSpec, layer_specs
from .opening import open_checkpoint
from .processes import run_on_all
from .reader import CHUNK_BYTES, DTYPES, FLOATS, read_rows
from .source import Source, file_order, sources
from .staging import expect_free, naming, staged


Format = Literal["hf", "mistral", "gguf"]


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor to write. `chunks` is called when the tensor is written."""

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
    finish: Callable[[Path], None] | None = None,
    type: str | None = None,
    tokenizer: Vocabulary | None = None,
):
    """Writes a model to a folder in the format of Hugging Face or of Mistral, or to a GGUF file.

    [`mistral_eqx.load`][] restores every weight bit for bit. The tokenizer is not part of the model:
    `finish=tokenizer.save` writes it into the same folder ([`mistral_eqx.text.AbstractTokenizer.save`][]).

    A sharded model is gathered to host one tensor at a time. If it is sharded over several processes, all of them must
    call this function, and process 0 writes.

    **Arguments:**

    - `model`: a model. In the format `"hf"` its linear layers may be quantized, all in one way: NF4 is written as
        bitsandbytes does, integers and FP8 as compressed-tensors does, so that transformers reads both. The layers of
        experts are written one by one in the same forms, which was compared with our own reader alone.
    - `path`: the folder. It appears when all of its files are complete.
    - `format`: `"hf"` for `config.json` and `model.safetensors`, which transformers loads; `"mistral"` for
        `params.json` and `consolidated.safetensors`; `"gguf"` for a file that llama.cpp runs.
    - `max_shard_size`: the largest size of a weight file, in bytes or as text such as `"500MB"` or `"2GiB"`. A model
        with several weight files also gets an index. A tensor is never split, even if it is larger, nor is a GGUF file.
    - `overwrite`: whether to replace an existing checkpoint, with all its files. The exchange is atomic: until the new
        checkpoint is complete, and after an error or a kill, the old one is there.
    - `allow_nonfinite`: whether to write weights with NaN or infinity. By default they are refused, because they are
        most likely the result of a training run that diverged or of a cast that overflowed.
    - `finish`: called with the temporary folder before it becomes `path`, to add more files.
    - `type`: of the weights in a GGUF file, such as `"Q8_0"`, or a mixture such as `"Q4_K_M"`
        ([`mistral_eqx.GGUF`][] has them). Unless given, weights in a type of GGUF keep it, and floats keep their
        precision. The embedding and the head have at least 8 bits, except in a mixture.
    - `tokenizer`: for a GGUF file, which holds it.

    **Raises:** `ValueError` if the format cannot store one of the weights, if a weight has NaN or infinity, or if the
    folder may not or cannot be written.
    """
    if format == "gguf" and finish is not None:
        raise InputError("A GGUF file is one file, to which nothing is added; leave finish out.", key="finish")
    if format != "gguf" and not (type is None and tokenizer is None):
        raise InputError(
            f"A type and a tokenizer are for GGUF files, and the format is {format!r}; leave them out, or write the "
            "tokenizer with finish=tokenizer.save.",
            key="type" if type is not None else "tokenizer",
        )
    check_whole(model)
    config = model.config
    nodes = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_weight)[0]
    weights = {layer_path(keys): node for keys, node in nodes if is_weight(node)}
    specs = list(layer_specs(config))
    unwritten: dict[str, jax.Array | np.ndarray] = {}
    packed: dict[str, dict[str, Packing]] = {}
    in_blocks: dict[str, BlockWeight] = {}
    unquantized: dict[str, BlockWeight] = {}
    for spec in specs:
        weight = weights.pop(spec.path, None)
        if format == "gguf" and isinstance(weight, BlockWeight) and weight.format in FORMATS:
            in_blocks[spec.path] = weight
            continue
        if isinstance(weight, BlockWeight) and weight.format in FLOATS:
            unquantized[spec.path] = weight
            continue
        if isinstance(weight, QUANTIZED) and format == "hf":
            packed[spec.path] = packings(spec, weight, config)
            continue
        found = weight.value if isinstance(weight, DenseWeight) else weight
        if not isinstance(found, jax.Array | np.ndarray):
            raise InputError(
                f"The model has no dense weight {spec.path!r}, which the format {format!r} requires; merge its "
                "adapters, or expand it with mistral_eqx.dequantize if it is quantized."
            )
        if found.shape != spec.shape(config) or found.dtype not in DTYPES.values():
            raise InputError(
                f"The model's weight {spec.path!r} is {found.dtype} of shape {found.shape}, but its config requires "
                f"{spec.shape(config)}, in {', '.join(DTYPES)}; cast it, or correct the config."
            )
        unwritten[spec.path] = found
    if weights:
        raise InputError(
            f"The model has a weight {min(weights)!r}, which a checkpoint cannot store; merge its adapters."
        )
    several = not all(isinstance(array, np.ndarray) or array.is_fully_addressable for array in unwritten.values())
    if several and (packed or unquantized or format == "gguf"):
        raise InputError(
            "The model is split over several processes, from which quantized weights and GGUF files are not written; "
            "load and save it in one process."
        )
    unwritten |= {
        spec.path: float_blocks(unquantized[spec.path]).reshape(spec.shape(config))
        for spec in specs
        if spec.path in unquantized
    }
    if format == "gguf":
        own = _ModelWeights(config, unwritten, in_blocks, allow_nonfinite)
        kept = {key: weight.format for key, weight in in_blocks.items()}
        main = max(unwritten.values(), key=lambda array: array.size).dtype.name
        _save_gguf(path, config, own, kept, main, type, tokenizer, overwrite)
        return
    tensors: list[_Tensor] = []
    for spec in specs:
        if spec.path in packed:
            tensors += _from_packings(packed[spec.path])
        else:
            tensors += _divided(spec, config, format, _from_array(spec, unwritten, config, format, allow_nonfinite))
    quantization = None
    if packed:
        linear = (spec for spec in specs if spec.in_dims and spec is not EMBEDDING and spec.path not in packed)
        left_out = [name.removesuffix(".weight") for spec in linear for name in spec.names(config, "hf")]
        quantization = whole_config({name: one for own in packed.values() for name, one in own.items()}, left_out)

    def write():
        with staged(path, overwrite=overwrite) as folder:
            _write(folder, config, tensors, format, max_shard_size, quantization)
            if finish is not None:
                finish(folder)

    def write_or_gather():
        try:
            if jax.process_index() == 0:
                write()
        finally:
            # Gathering is collective: all processes must gather all tensors, even if process 0 cannot write.
            for name in tuple(unwritten):
                _gather_to_host(unwritten.pop(name))

    if not several:
        write()
        return
    run_on_all("target folder", lambda: jax.process_index() == 0 and expect_free(path, overwrite), several)
    run_on_all("saved checkpoint", write_or_gather, several)


@dataclasses.dataclass(frozen=True)
class _ModelWeights(AbstractWeights):
    """The weights of a model, for a GGUF file."""

    config: MistralConfig
    arrays: Mapping[str, jax.Array | np.ndarray]
    in_blocks: Mapping[str, BlockWeight]
    allow_nonfinite: bool

    def blocks(self, spec: LayerSpec, type: str) -> np.ndarray | None:
        weight = self.in_blocks.get(spec.path)
        return rows_of_blocks(weight) if weight is not None and weight.format == type else None

    def numbers(self, spec: LayerSpec) -> Iterator[np.ndarray]:
        if (weight := self.in_blocks.get(spec.path)) is not None:
            yield np.asarray(weight.dense(), np.float32).reshape(spec.file_shape(self.config))
            return
        yield from _from_array(spec, dict(self.arrays), self.config, "gguf", self.allow_nonfinite).chunks()


@dataclasses.dataclass(frozen=True)
class _FileWeights(AbstractWeights):
    """The weights of a checkpoint, for a GGUF file."""

    sources: Mapping[str, Source]
    path: Path
    allow_nonfinite: bool
    report: Callable[[int], None]

    def blocks(self, spec: LayerSpec, type: str) -> np.ndarray | None:
        source = self.sources[spec.path]
        packed = source.tensor.packed
        if packed is None or packed.format != type:
            return None
        raw = packed.blocks.rows(0, packed.blocks.shape[0])
        self.report(source.tensor.nbytes)
        return raw[file_order(spec, source.config, source.format)]

    def numbers(self, spec: LayerSpec) -> Iterator[np.ndarray]:
        source = self.sources[spec.path]
        dtype = np.dtype(np.float32)
        yield from _from_source(source, dtype, "gguf", self.report, self.path, self.allow_nonfinite).chunks()


def _save_gguf(
    path: str | os.PathLike[str],
    config: MistralConfig,
    weights: AbstractWeights,
    kept: Mapping[str, str],
    main: str,
    type: str | None,
    tokenizer: Vocabulary | None,
    overwrite: bool,
):
    """Writes a GGUF file. `kept` has the types of weights that are quantized already, `main` is the main dtype."""
    if tokenizer is None:
        raise InputError(
            "A GGUF file holds its tokenizer, and none is given; give the model's, as in "
            "tokenizer=load_tokenizer(path).",
            key="tokenizer",
        )
    if type is not None:
        # Refuses a type that numbers are not quantized to.
        GGUF(type)
    floats = {dtype.name: name for name, dtype in FLOATS.items()}
    types = chosen_types(config, type or floats[main], kept if type is None else {})
    most = Counter(types.values()).most_common(1)[0][0] if type is None else type
    write_gguf(path, config, weights, types, tokenizer, type=most, overwrite=overwrite)


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
    type: str | None = None,
    tokenizer: Vocabulary | None = None,
):
    """Writes the config and the weights of a checkpoint in another format or dtype; see [`mistral_eqx.convert`][].

    **Arguments:**

    - `source`: the checkpoint, as for [`mistral_eqx.load`][].
    - `target`, `format`, `max_shard_size`, `overwrite`: as for [`mistral_eqx.save`][].
    - `dtype`: the dtype of all weights; by default the source's main dtype, and float32 for quantised files.
    - `allow_nonfinite`: whether to write weights that are NaN or infinite, in the source or after the cast to `dtype`.
    - `progress`: called after each tensor with the bytes read so far and the total bytes.
    - `finish`: called with the temporary folder before it becomes `target`, to add more files.
    - `type`, `tokenizer`: for a GGUF file, as for [`mistral_eqx.save`][].

    **Raises:** `ValueError` that names the error in the source, or if the target may not or cannot be written.
    """
    checkpoint = open_checkpoint(locate(source))
    target_dtype = checkpoint.dtype if dtype is None else supported_dtype(dtype)
    found = sources(checkpoint)
    total, done = sum(each.tensor.nbytes for each in found), 0

    def report(nbytes: int):
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    if format == "gguf":
        by_path = {each.spec.path: each for each in found}
        packed = {path: each.tensor.packed for path, each in by_path.items()}
        kept = {path: one.format for path, one in packed.items() if one is not None and one.format in FORMATS}
        kept = kept if dtype is None else {}
        weights = _FileWeights(by_path, checkpoint.path, allow_nonfinite, report)
        _save_gguf(target, checkpoint.config, weights, kept, target_dtype.name, type, tokenizer, overwrite)
        return
    tensors: list[_Tensor] = []
    for each in found:
        whole = _from_source(each, target_dtype, format, report, checkpoint.path, allow_nonfinite)
        tensors += _divided(each.spec, checkpoint.config, format, whole)
    with staged(target, overwrite=overwrite) as folder:
        _write(folder, checkpoint.config, tensors, format, max_shard_size)
        if finish is not None:
            finish(folder)


def _from_array(
    spec: LayerSpec,
    unwritten: dict[str, jax.Array | np.ndarray],
    config: MistralConfig,
    format: Format,
    allow_nonfinite: bool,
) -> _Tensor:
    """A tensor of the model. Its `chunks` removes the array from `unwritten`, and gathers it to host."""
    shape = spec.file_shape(config)

    def chunks() -> Iterator[np.ndarray]:
        flat = _gather_to_host(unwritten.pop(spec.path)).reshape(shape)
        for model_rows in _model_rows(spec, config, format, flat.dtype):
            chunk = flat[model_rows]
            if not allow_nonfinite and not all_finite(chunk):
                raise InputError(
                    f"The tensor {spec.name(format)!r} (the model's {spec.path!r}) holds NaN or infinity, so nothing "
                    "was saved; use the model from before it diverged, or save it as it is (allow_nonfinite=True).",
                    key=spec.name(format),
                )
            yield chunk

    return _Tensor(spec.name(format), shape, np.dtype(unwritten[spec.path].dtype), chunks)


def _from_packings(packings: Mapping[str, Packing]) -> list[_Tensor]:
    """The tensors of a quantized weight, or of those of its experts, by what their names begin with."""

    def of(packing: Packing, end: str) -> Callable[[], Iterator[np.ndarray]]:
        return lambda: iter([packing.arrays()[end]])

    return [
        _Tensor(f"{stem}.{end}", shape, dtype, of(packing, end))
        for stem, packing in packings.items()
        for end, (shape, dtype) in packing.shapes.items()
    ]


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
                problem = f"has numbers that {dtype.name} cannot hold" if overflows else "holds NaN or infinity"
                remedy = "choose another dtype" if overflows else "fetch it again"
                raise InputError(
                    f"The tensor {tensor.name!r} of {str(path)!r} {problem}, so nothing was written; {remedy}, or "
                    "write it as it is (allow_nonfinite=True).",
                    file=path,
                    key=tensor.name,
                )
            yield chunk
        report(tensor.nbytes)

    return _Tensor(spec.name(format), spec.file_shape(config), dtype, chunks)


def _model_rows(spec: LayerSpec, config: MistralConfig, format: Format, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The rows of the model's tensor in the order of the file, a chunk at a time."""
    _, *width = spec.file_shape(config)
    order = np.argsort(file_order(spec, config, format))
    step = max(1, CHUNK_BYTES // (int(np.prod(width)) * dtype.itemsize))
    for tensor in np.split(order, len(spec.names(config, format))):
        for start in range(0, len(tensor), step):
            yield tensor[start : start + step]


def _divided(spec: LayerSpec, config: MistralConfig, format: Format, whole: _Tensor) -> list[_Tensor]:
    """The tensors of a file that hold a weight, of which the format may store one for each expert.

    They are written one after the other, and each takes its chunks from those of the whole weight.
    """
    names = spec.names(config, format)
    if len(names) == 1:
        return [whole]
    rows, inner = whole.shape[0] // len(names), whole.shape[1:]
    remaining = whole.chunks()

    def chunks() -> Iterator[np.ndarray]:
        done = 0
        while done < rows:
            chunk = next(remaining)
            done += len(chunk)
            yield chunk

    return [dataclasses.replace(whole, name=name, shape=(rows, *inner), chunks=chunks) for name in names]


_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(gate|up|down)_proj\.weight")


def _stacked(tensors: list[_Tensor]) -> list[_Tensor]:
    """The tensors, with the floats of the experts of a layer in two, as type `mistral4` of transformers has them.

    In `gate_up_proj`, the rows of an expert's `gate_proj` come before those of its `up_proj`.
    """
    found: dict[str, dict[str, list[_Tensor]]] = {}
    for tensor in tensors:
        kind, name = "", tensor.name
        if (match := _EXPERT.fullmatch(tensor.name)) is not None and tensor.dtype in DTYPES.values():
            layer, kind = match.groups()
            name = f"{layer}.{'down' if kind == 'down' else 'gate_up'}_proj"
        found.setdefault(name, {}).setdefault(kind, []).append(tensor)
    return [_joined(name, list(kinds.values())) if "" not in kinds else kinds[""][0] for name, kinds in found.items()]


def _joined(name: str, columns: list[list[_Tensor]]) -> _Tensor:
    """One tensor that holds, for each expert, the rows of its tensor of each column."""
    first = columns[0][0]
    rows = sum(column[0].shape[0] for column in columns)

    def chunks() -> Iterator[np.ndarray]:
        for of_expert in zip(*columns, strict=True):
            for tensor in of_expert:
                yield from tensor.chunks()

    return dataclasses.replace(first, name=name, shape=(len(columns[0]), rows, *first.shape[1:]), chunks=chunks)


def _gather_to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Gathers an array to host. All processes that hold shards of it must call this function."""
    if isinstance(array, np.ndarray):
        return array
    if array.is_fully_replicated:
        return _copy_to_host(array.addressable_data(0))
    if not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    result = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            result[shard.index] = _copy_to_host(shard.data)
    return result


def _copy_to_host(array: jax.Array) -> np.ndarray:
    try:
        # A `jax.Array` caches its numpy copy. A temporary copy on the CPU backend keeps that memory short-lived.
        return np.asarray(jax.device_put(array, jax.local_devices(backend="cpu")[0]))
    except RuntimeError:
        return np.asarray(array)


def _write(
    folder: Path,
    config: MistralConfig,
    tensors: list[_Tensor],
    format: Format,
    max_shard_size: int | str,
    quantization: dict[str, Any] | None = None,
):
    """Writes the config and the weights, in files of at most the given size."""
    floats = {tensor.dtype for tensor in tensors if tensor.dtype in DTYPES.values()}
    dtype = max(floats, key=lambda kind: _total(tensors, kind))
    if format == "hf" and config.latent is not None:
        tensors = _stacked(tensors)
    if format == "hf":
        settings_file, settings = "config.json", {**hf.write_config(config), "torch_dtype": dtype.name}
        if quantization is not None:
            settings["quantization_config"] = quantization
        single, index = hf.WEIGHTS, hf.INDEX
    elif format == "mistral":
        settings_file, settings = "params.json", mistral.write_config(config)
        single, index = mistral.WEIGHTS, mistral.INDEX
    else:
        raise InputError(f"The format {format!r} cannot be written; give 'hf', 'mistral' or 'gguf'.")
    _write_json(folder / settings_file, settings)
    shards = _shards(tensors, _bytes(max_shard_size))
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
