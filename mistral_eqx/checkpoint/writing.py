"""Writes the files of a checkpoint, from a model or from another checkpoint."""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import DTypeLike

from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from ..nn import DenseWeight, Mistral, Stacked
from ..nn.block import check_whole
from ..parallel import number_of_first
from ..quant import FORMATS, GGUF, QUANTIZED, BlockWeight
from . import hf, mistral, safetensors
from .experts import RowsTensor, is_joined, runs_of
from .finite import all_finite
from .gguf_writing import AbstractWeights, Vocabulary, chosen_types, write_gguf
from .hf_packed import Packing, float_blocks, packings, rows_of_blocks, whole_config
from .hub import locate
from .loading import Progress, is_weight, layer_path, supported_dtype
from .names import EMBEDDING, LayerSpec, layer_specs
from .opening import open_checkpoint
from .placement import Index
from .processes import run_on_all
from .reader import CHUNK_BYTES, DTYPES, FLOATS, LazyTensor, read_rows
from .source import Source, file_order, sources
from .staging import naming, number_of, staged, staged_elsewhere, sync


Format = Literal["hf", "mistral", "gguf"]


@dataclasses.dataclass(frozen=True)
class _Entry:
    """The array of one layer in a stacked array, of which nothing is copied before it is written."""

    stacked: jax.Array | np.ndarray
    number: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stacked.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.stacked.dtype)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_fully_addressable(self) -> bool:
        return isinstance(self.stacked, np.ndarray) or self.stacked.is_fully_addressable

    def own_shards(self, several: bool) -> "Shards":
        """As `_own_shards`."""
        shards: Shards = []
        for (of_layers, *index), shard in _own_shards(self.stacked, several):
            layers = range(len(self.stacked))[of_layers]
            if self.number in layers and not isinstance(shard, _Entry):
                shards.append((tuple(index), _Entry(shard, layers.index(self.number))))
        return shards

    def copy_to_host(self) -> np.ndarray:
        """As `_copy_to_host`."""
        # On the CPU the host shares the memory of the device.
        if isinstance(self.stacked, np.ndarray) or self.stacked.platform() == "cpu":
            return np.asarray(self.stacked)[self.number]
        number = np.int32(self.number)  # not a constant, which would compile a program for each layer
        return _copy_to_host(jax.lax.dynamic_index_in_dim(self.stacked, number, keepdims=False))


Numbers = jax.Array | np.ndarray | _Entry
Shards = list[tuple[Index, Numbers]]


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the files."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def save(
    model: Mistral | Stacked,
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

    A sharded model is written one shard at a time, each to its place in the files. If it is sharded over several
    processes, all of them must call this function, with the same path in a file system that their hosts share: each
    writes the shards of its own devices, and process 0 the other files. So each stage of a pipeline writes its layers.

    **Arguments:**

    - `model`: a model, whose blocks may be stacked if its weights are floats. In the format `"hf"` its linear layers
        may be quantized, all in one way: NF4 is written as bitsandbytes does, integers and FP8 as compressed-tensors
        does, so that transformers reads both. The layers of experts are written one by one in the same forms, which was
        compared with our own reader alone.
    - `path`: the folder. It appears when all of its files are complete.
    - `format`: `"hf"` for `config.json` and `model.safetensors`, which transformers loads; `"mistral"` for
        `params.json` and `consolidated.safetensors`; `"gguf"` for a file that llama.cpp runs.
    - `max_shard_size`: the largest size of a weight file, in bytes or as text such as `"500MB"` or `"2GiB"`. A model
        with several weight files also gets an index. A tensor is never split, even if it is larger, nor is a GGUF file.
    - `overwrite`: whether to replace an existing checkpoint, with all its files. The exchange is atomic: until the new
        checkpoint is complete, and after an error or a kill, the old one is there.
    - `allow_nonfinite`: whether to write weights with NaN or infinity. By default they are refused, because they are
        most likely the result of a training run that diverged or of a cast that overflowed.
    - `finish`: called by process 0 with the temporary folder before it becomes `path`, to add more files.
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
    weights = _weights(model)
    specs = list(layer_specs(config))
    unwritten: dict[str, Numbers] = {}
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
        if not isinstance(found, Numbers):
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
        model_weights = _ModelWeights(config, unwritten, in_blocks, allow_nonfinite)
        kept = {key: weight.format for key, weight in in_blocks.items()}
        main = max(unwritten.values(), key=lambda array: array.size).dtype.name
        _save_gguf(path, config, model_weights, kept, main, type, tokenizer, overwrite)
        return
    tensors: list[_Tensor] = []
    for spec in specs:
        if spec.path in packed:
            tensors += _of_packings(packed[spec.path])
        else:
            tensors += _described(spec, config, format, np.dtype(unwritten[spec.path].dtype))
    quantization = None
    if packed:
        linear = (spec for spec in specs if spec.in_dims and spec is not EMBEDDING and spec.path not in packed)
        left_out = [name.removesuffix(".weight") for spec in linear for name in spec.names(config, "hf")]
        quantization = whole_config({name: one for own in packed.values() for name, one in own.items()}, left_out)

    with contextlib.ExitStack() as staging:

        def create() -> Path | None:
            if several and jax.process_index():
                return None
            folder = staging.enter_context(staged(path, overwrite=overwrite))
            _create(folder, config, tensors, format, max_shard_size, quantization)
            return folder

        def fill():
            shards = {name: _own_shards(array, several) for name, array in unwritten.items()}
            if own is None and not any(shards.values()):
                return
            folder = staging.enter_context(staged_elsewhere(path, number)) if own is None else own
            written = _written(folder)
            for spec in specs:
                for stem, packing in packed.get(spec.path, {}).items():
                    for end, array in packing.arrays().items():
                        written[f"{stem}.{end}"].write(0, array)
                if spec.path in shards:
                    _write_shards(_into(written, spec, config, format, folder), shards[spec.path], allow_nonfinite)
            if several:
                sync(folder)

        def complete():
            if own is not None and finish is not None:
                finish(own)
            staging.close()

        own = run_on_all("target folder", create, several)
        number = number_of_first(0 if own is None else number_of(own)) if several else 0
        run_on_all("saved checkpoint", fill, several)
        run_on_all("saved checkpoint", complete, several)


def _weights(model: Mistral | Stacked) -> dict[str, Any]:
    """The weights of a model by the paths of its layers; of stacked blocks, the entry of each layer."""
    nodes = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_weight)[0]
    weights = {layer_path(keys): node for keys, node in nodes if is_weight(node)}
    if isinstance(model, Mistral):
        return weights
    by_layer: dict[str, Any] = {}
    for path, node in weights.items():
        field, own = path.split(".", 1)
        if field == "outer":
            by_layer[own] = node
            continue
        number, own = own.split(".", 1)
        stacked = node.value if isinstance(node, DenseWeight) else node
        if not isinstance(stacked, jax.Array | np.ndarray):
            raise InputError(
                f"The weights {own!r} of the stacked model are quantized or have adapters, and a stacked model is "
                "saved in floats alone; save mistral_eqx.nn.unstack of it."
            )
        for entry, layer in enumerate(model.layers(int(number))):
            by_layer[f"blocks.{layer}.{own}"] = _Entry(stacked, entry)
    return by_layer


@dataclasses.dataclass(frozen=True)
class _ModelWeights(AbstractWeights):
    """The weights of a model, for a GGUF file."""

    config: MistralConfig
    arrays: Mapping[str, Numbers]
    in_blocks: Mapping[str, BlockWeight]
    allow_nonfinite: bool

    def blocks(self, spec: LayerSpec, type: str) -> np.ndarray | None:
        weight = self.in_blocks.get(spec.path)
        return rows_of_blocks(weight) if weight is not None and weight.format == type else None

    def numbers(self, spec: LayerSpec) -> Iterator[np.ndarray]:
        if (weight := self.in_blocks.get(spec.path)) is not None:
            yield np.asarray(weight.dense(), np.float32).reshape(spec.file_shape(self.config))
            return
        flat = _gathered(self.arrays[spec.path]).reshape(spec.file_shape(self.config))
        for rows in _chunks_of_rows(spec, self.config, "gguf", flat.dtype):
            if not self.allow_nonfinite:
                _expect_finite(flat[rows], spec, "gguf")
            yield flat[rows]


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
        yield from _from_source(source, dtype, "gguf", self.path, self.allow_nonfinite)
        self.report(source.tensor.nbytes)


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
        tensors += _described(each.spec, checkpoint.config, format, target_dtype)
    with staged(target, overwrite=overwrite) as folder:
        _create(folder, checkpoint.config, tensors, format, max_shard_size)
        written = _written(folder)
        for each in found:
            into, start = _into(written, each.spec, checkpoint.config, format, folder), 0
            for chunk in _from_source(each, target_dtype, format, checkpoint.path, allow_nonfinite):
                into.tensor.write(start, chunk)
                start += len(chunk)
            report(each.tensor.nbytes)
        if finish is not None:
            finish(folder)


def _described(spec: LayerSpec, config: MistralConfig, format: Format, dtype: np.dtype) -> list[_Tensor]:
    """The tensors of a file that hold a weight in floats: one, or one for each expert."""
    names, (rows, *inner) = spec.names(config, format), spec.file_shape(config)
    return [_Tensor(name, (rows // len(names), *inner), dtype) for name in names]


def _of_packings(packings: Mapping[str, Packing]) -> list[_Tensor]:
    """The tensors of a quantized weight, or of those of its experts, by what their names begin with."""
    return [
        _Tensor(f"{stem}.{end}", shape, dtype)
        for stem, packing in packings.items()
        for end, (shape, dtype) in packing.shapes.items()
    ]


def _written(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of the files that `_create` made."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.read_header(file, packed=True).items()}


def _into(
    written: Mapping[str, LazyTensor], spec: LayerSpec, config: MistralConfig, format: Format, folder: Path
) -> Source:
    """Where a weight is written: the source from which it will be read."""
    name = spec.name(format)
    if is_joined(spec):
        return Source(spec, RowsTensor(name, runs_of(written, spec, config, format, folder)), config, format)
    return Source(spec, written[name], config, format)


def _write_shards(into: Source, shards: Shards, allow_nonfinite: bool):
    for index, shard in shards:
        for start, block, columns in into.pieces(index, _copy_to_host(shard)):
            if not allow_nonfinite:
                _expect_finite(block, into.spec, into.format)
            into.tensor.write(start, block, columns)


def _expect_finite(block: np.ndarray, spec: LayerSpec, format: str):
    if not all_finite(block):
        raise InputError(
            f"The tensor {spec.name(format)!r} (the model's {spec.path!r}) holds NaN or infinity, so nothing was "
            "saved; use the model from before it diverged, or save it as it is (allow_nonfinite=True).",
            key=spec.name(format),
        )


def _from_source(
    source: Source, dtype: np.dtype, format: Format, path: Path, allow_nonfinite: bool
) -> Iterator[np.ndarray]:
    """The rows of a weight of a checkpoint in the order of a file in `format`, a chunk at a time."""
    spec, config, tensor = source.spec, source.config, source.tensor
    order = file_order(spec, config, source.format)
    for model_rows in _chunks_of_rows(spec, config, format, dtype):
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


def _chunks_of_rows(spec: LayerSpec, config: MistralConfig, format: Format, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The rows of the model's tensor in the order of the file, a chunk at a time."""
    _, *width = spec.file_shape(config)
    order = np.argsort(file_order(spec, config, format))
    step = max(1, CHUNK_BYTES // (int(np.prod(width)) * dtype.itemsize))
    for start in range(0, len(order), step):
        yield order[start : start + step]


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
    return _Tensor(name, (len(columns[0]), rows, *first.shape[1:]), first.dtype)


def _own_shards(array: Numbers, several: bool) -> Shards:
    """The shards of an array that this process writes. Of `several` processes, one writes each shard."""
    if isinstance(array, _Entry):
        return array.own_shards(several)
    is_local = isinstance(array, np.ndarray) or array.is_fully_addressable
    if several and is_local and jax.process_index():
        return []
    if isinstance(array, np.ndarray):
        return [((slice(None),) * array.ndim, array)]
    return [(shard.index, shard.data) for shard in array.addressable_shards if shard.replica_id == 0]


def _gathered(array: Numbers) -> np.ndarray:
    """An array of this process's devices, on the host."""
    result = np.empty(array.shape, array.dtype)
    for index, shard in _own_shards(array, several=False):
        result[index] = _copy_to_host(shard)
    return result


def _copy_to_host(array: Numbers) -> np.ndarray:
    if isinstance(array, _Entry):
        return array.copy_to_host()
    if isinstance(array, np.ndarray):
        return array
    try:
        # A `jax.Array` caches its numpy copy. A temporary copy on the CPU backend keeps that memory short-lived.
        return np.asarray(jax.device_put(array, jax.local_devices(backend="cpu")[0]))
    except RuntimeError:
        return np.asarray(array)


def _create(
    folder: Path,
    config: MistralConfig,
    tensors: list[_Tensor],
    format: Format,
    max_shard_size: int | str,
    quantization: dict[str, Any] | None = None,
):
    """Writes the config and the index, and creates files for the weights, of at most the given size."""
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
        with naming(folder / name):
            safetensors.create(folder / name, [(tensor.name, tensor.shape, tensor.dtype) for tensor in shard])
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
