"""GGUF, the format of llama.cpp: keys and values, then tensors, most of them quantised in blocks."""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..checks import Count, CountOrZero, checked
from ..config import Base, Epsilon, Layers, MistralConfig, Routing, Size
from ..documents import expect_regular, shown
from ..errors import InputError
from ..quant import FORMATS
from .experts import join_experts
from .gguf_header import TensorInfo, read_header, shortest
from .gguf_latent import ARCHITECTURES, join_keys_and_values, read_groups, read_latent
from .gguf_rope import DIVISORS, read_rope, with_divisors
from .gguf_shards import first_shard, shard_count, shard_path
from .mixed import keep_16_bits
from .names import HEAD
from .ranges import of_columns, read_ranges
from .reader import DTYPES, FLOATS, Checkpoint, LazyTensor, Packed
from .safetensors import PlainTensor
from .settings import REQUIRED, Settings, per_kv, read_routing
from .weight_files import WeightFiles


class QuantisedTensor(LazyTensor):
    """A tensor in quantised blocks, dequantised to float32 when it is read.

    The smallest unit of reading is a block, even if only some of its columns are requested.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: gguf.GGMLQuantizationType,
        row_bytes: int,
        path: Path,
        offset: int,
    ):
        super().__init__(name, shape, DTYPES["float32"], kind.name, math.prod(shape[:-1]) * row_bytes)
        self._kind = kind
        self._row_bytes = row_bytes
        self._path = path
        self._offset = offset
        if kind.name in FORMATS:
            rows = math.prod(shape[:-1]), row_bytes
            blocks = PlainTensor(name, rows, np.dtype(np.uint8), kind.name, path, offset)
            self.packed = Packed(kind.name, blocks)

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        if len(self.shape) == 1:
            # An entry of a quantised vector has no address of its own, so the whole vector is read.
            return self._dequantised(0, 1)[0, start:stop].copy()
        if columns is not None:
            block = gguf.GGML_QUANT_SIZES[self._kind][0]
            blocks = np.unique(columns // block)
            values = self._dequantised(start, stop, blocks)
            whole = len(columns) == values.shape[1]
            return values if whole else values[:, np.searchsorted(blocks, columns // block) * block + columns % block]
        inner = math.prod(self.shape[1:-1])
        values = self._dequantised(start * inner, stop * inner)
        return values.reshape(stop - start, *self.shape[1:])

    def _dequantised(self, start: int, stop: int, blocks: np.ndarray | None = None) -> np.ndarray:
        count, offset = stop - start, self._offset + start * self._row_bytes
        block, block_bytes = gguf.GGML_QUANT_SIZES[self._kind]
        if blocks is None:
            raw = np.empty((count, self._row_bytes), np.uint8)
            ranges = [(offset, raw.nbytes)]
        else:
            raw = np.empty((count, len(blocks) * block_bytes), np.uint8)
            ranges = of_columns(offset, count, self._row_bytes, blocks, block_bytes)
        read_ranges(self._path, ranges, raw)
        if not raw.size:
            return np.empty((count, raw.shape[1] // block_bytes * block), np.float32)
        return gguf.quants.dequantize(raw, self._kind).astype(np.float32, copy=False)


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file, or all files of a model that is split.

    **Arguments:**

    - `path`: the file, of architecture `llama`, `mistral3`, `mistral4` or `deepseek2`; any of them, if the model is
        split.

    **Returns:** the checkpoint.

    **Raises:** `InputError` if the file is not a GGUF file, is truncated, or holds something that is not supported.
    """
    path = first_shard(path)
    metadata, tensors = read_gguf(path)
    if metadata.get("split.count", 0) not in (0, 1):
        metadata, tensors = _with_other_shards(path, metadata, tensors)
    if not tensors:
        raise InputError(f"{str(path)!r} holds no tensors; give a file with a model's weights.", file=path)
    config = read_config(metadata, tied=HEAD.name("gguf") not in tensors, file=path)
    if DIVISORS in tensors and config.latent is None:
        config = _with_divisors(config, tensors[DIVISORS], path)
    dtypes = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) >= 2}
    dtype = dtypes.pop() if len(dtypes) == 1 else DTYPES["float32"]
    if dtype == DTYPES["float32"]:
        keep_16_bits(tensors)
    tensors = join_experts(join_keys_and_values(tensors, config, path), config, "gguf", path)
    return Checkpoint(path, "gguf", config, dtype, tensors, metadata)


def _with_divisors(config: MistralConfig, tensor: LazyTensor, path: Path) -> MistralConfig:
    scaled = with_divisors(config, tensor[:].astype(np.float64)) if config.rope_scaling is None else None
    if scaled is None:
        raise InputError(
            f"{str(path)!r} has a tensor {DIVISORS!r}, which divides the angles of the rotary embedding otherwise than "
            "Llama 3 does; use a model without it.",
            file=path,
            key=DIVISORS,
        )
    return scaled


def _with_other_shards(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, LazyTensor]
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """The keys of the first file of a split model without those about the split, and the tensors of all files."""
    count = checked(metadata["split.count"], Count, f"The key split.count of {str(path)!r}", file=path)
    if shard_count(path) != count:
        raise InputError(
            f"{str(path)!r} is one of {count} files of a model, but its name does not end in "
            f"-00001-of-{count:05}.gguf; give the files their names, or merge them with llama.cpp's llama-gguf-split "
            "--merge.",
            file=path,
            key="split.count",
        )
    found = dict(tensors)
    for number in range(2, count + 1):
        shard = shard_path(path, number)
        assert shard is not None
        if not shard.is_file():
            raise InputError(
                f"{str(path)!r} is one of {count} files of a model, and {shard.name!r} is not beside it; fetch it too.",
                file=shard,
            )
        own, more = read_gguf(shard)
        twice = found.keys() & more.keys()
        if own.get("split.no") != number - 1 or own.get("split.count") != count or twice:
            raise InputError(
                f"{str(shard)!r} does not belong to the model of {path.name!r}: its number or its tensors do not fit; "
                "fetch both again.",
                file=shard,
            )
        found |= more
    if len(found) != metadata.get("split.tensors.count", len(found)):
        raise InputError(
            f"{str(path)!r} says that its model has {shown(metadata['split.tensors.count'])} tensors, but its {count} "
            f"files have {len(found)}; fetch them again.",
            file=path,
            key="split.tensors.count",
        )
    return {key: value for key, value in metadata.items() if not key.startswith("split.")}, found


def find_weights(files: Sequence[Path]) -> list[WeightFiles]:
    """The weights in the GGUF files of a folder."""
    return [WeightFiles(file.name, "gguf", lambda _, file=file: read_gguf(file)[1]) for file in files]


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Reads the header of a GGUF file: its keys and values, and its tensors.

    The gguf package makes an array of each token of the vocabulary, which takes seconds; this function parses the
    header in one pass.

    **Arguments:**

    - `path`: the file.

    **Returns:** the values by their keys, and the tensors by their names.

    **Raises:** `InputError` if the file is not a GGUF file, is truncated, has an element type that is not supported,
    or does not store its tensors as llama.cpp does: in the order of the header, each at the next multiple of the
    alignment, and nothing after the last one.
    """
    expect_regular(path)
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{str(path)!r} is empty; fetch it again.", file=path)
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{str(path)!r} is not a GGUF file: it does not begin with the letters GGUF.", file=path)
        try:
            header = read_header(file, size)
        except EOFError as error:
            raise InputError(f"{str(path)!r} is truncated within its header; fetch it again.", file=path) from error
        except InputError as error:
            raise InputError(f"{str(path)!r} {error}", file=path, key=error.key) from error
    base = stop = end = _aligned(header.end, header.alignment)
    tensors: dict[str, LazyTensor] = {}
    for name, info in header.tensors.items():
        start, stop = end, end + _nbytes(path, name, info)
        if base + info.offset != start:
            raise InputError(
                f"{str(path)!r} is damaged: its header puts the tensor {shown(name)} at offset {info.offset}, which is "
                "not where the tensor before it ends; fetch it again.",
                file=path,
                key=name,
            )
        if stop > size:
            raise InputError(
                f"{str(path)!r} is truncated: it has {size} bytes, but the tensor {shown(name)} ends at {shown(stop)}; "
                "fetch it again.",
                file=path,
                key=name,
            )
        tensors[name] = _tensor(path, name, info, start)
        end = _aligned(stop, header.alignment)
    # A file may omit the padding after its last tensor.
    if tensors and size > end:
        raise InputError(
            f"{str(path)!r} is damaged: it has {size} bytes, but its last tensor ends at {stop}; fetch it again.",
            file=path,
        )
    return header.metadata, tensors


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _kind(path: Path, name: str, info: TensorInfo) -> gguf.GGMLQuantizationType:
    try:
        known = gguf.GGMLQuantizationType(info.kind)
    except ValueError:
        known = None
    if known is None or not (known.name in FLOATS or _can_dequantise(known)):
        stored = str(info.kind) if known is None else known.name
        raise InputError(
            f"The tensor {shown(name)} of {str(path)!r} has the element type {stored}, which the gguf package cannot "
            "dequantise; use a file with another quantisation, such as Q8_0 or Q4_K_M.",
            file=path,
            key=name,
        )
    return known


def _row_bytes(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return shape[-1] // block * block_bytes


def _nbytes(path: Path, name: str, info: TensorInfo) -> int:
    kind = _kind(path, name, info)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if not info.shape or info.shape[-1] % block:
        raise InputError(
            f"{str(path)!r} is damaged: the tensor {shown(name)} has shape {info.shape} in blocks of {block}; fetch it "
            "again.",
            file=path,
            key=name,
        )
    return math.prod(info.shape[:-1]) * _row_bytes(kind, info.shape)


def _tensor(path: Path, name: str, info: TensorInfo, offset: int) -> LazyTensor:
    kind = _kind(path, name, info)
    if kind.name in FLOATS:
        return PlainTensor(name, info.shape, FLOATS[kind.name], kind.name, path, offset)
    return QuantisedTensor(name, info.shape, kind, _row_bytes(kind, info.shape), path, offset)


@functools.cache
def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the gguf package can dequantise a type. It has no list of its types, so this function tries."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


# Tokens that llama.cpp takes as the end of a sequence, turn or message, whatever type the file gives them.
_EOS_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<turn|>",
    "<|tool_response>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
)


def eos_ids_by_name(tokens: Any, unknown: int | None) -> list[int]:
    """The ids of the tokens whose name marks the end of a sequence, turn or message, by llama.cpp's rules.

    **Arguments:**

    - `tokens`: the vocabulary of a GGUF file, in the order of its ids.
    - `unknown`: the id of the token for unknown words, which is excluded.
    """
    names = tokens if isinstance(tokens, list) else []
    ids = {name: id for id, name in enumerate(names) if isinstance(name, str) and name in _EOS_NAMES and id != unknown}
    # In formats with channels and tools, these tokens also occur within a turn.
    calls = {"<|call|>", "<|calls|>"} & ids.keys()
    if calls and ("<|flush|>" in ids or {"<|return|>", "<|call|>"} <= ids.keys()):
        ids.pop("<|end|>", None)
    if "<|tool_response>" in ids:
        ids.pop("</s>", None)
    return sorted(ids.values())


_ARCHITECTURES = ("llama", "mistral3", *ARCHITECTURES)
_WITHOUT_EFFECT = ("tensor_data_layout", "rope.scaling.finetuned")


def read_config(
    metadata: Mapping[str, Any], *, tied: bool = False, file: str | os.PathLike[str] | None = None
) -> MistralConfig:
    """Reads the metadata of a GGUF file of architecture `llama`, which llama.cpp uses for Mistral models too,
    `mistral3`, or with latent attention `mistral4` or `deepseek2`.

    **Arguments:**

    - `metadata`: the file's keys and values; of arrays only the length is used.
    - `tied`: whether the head is the embedding table. No key gives it: a file with a tied head has no tensor
        `output.weight`.
    - `file`: the path of the file, for error messages.

    **Returns:** the config. As in llama.cpp, a missing window means no window, and a missing rope base means 10000.

    **Raises:** `ValueError` that names the key, if a key is missing, has an invalid value, or requires a computation
    that this package does not support.
    """
    document = Settings(metadata, "GGUF metadata", file)
    document.expect("general.architecture", _ARCHITECTURES, None)
    arch = document.take("general.architecture", str)
    document.expect("general.type", ("model", None), None)
    shards = document.take("split.count", CountOrZero | None, None) or 1
    if shards > 1:
        raise document.wrong(
            "split.count",
            f"{document.name} is one of {shards} shards; merge them first with llama.cpp's llama-gguf-split --merge.",
        )
    document.expect(f"{arch}.attention.causal", (True, None), None)
    layers = document.take(f"{arch}.block_count", Layers)
    max_positions = document.take(f"{arch}.context_length", Count)
    embed = document.take(f"{arch}.embedding_length", Size)
    heads = document.take(f"{arch}.attention.head_count", Size)
    norm_eps = shortest(document.take(f"{arch}.attention.layer_norm_rms_epsilon", Epsilon))
    with document.naming():
        rope, of_scores = read_rope(document, arch, max_positions)
    latent, routing = None, _routing(document, arch)
    if arch in ARCHITECTURES:
        latent = read_latent(document, arch, heads, norm_eps, of_scores)
        routing = read_groups(document, arch, routing, layers)
        kv_heads, head_dim = heads, latent.nope_dim + latent.rope_dim
    else:
        kv_heads = document.take(f"{arch}.attention.head_count_kv", Size, heads)
        default = embed // heads if embed % heads == 0 else REQUIRED
        head_dim = document.take(f"{arch}.attention.key_length", Size, default)
        for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
            document.expect(key, (head_dim,), head_dim, Size)
    tokens = document.take("tokenizer.ggml.tokens", Any, None)
    count = None if tokens is None or isinstance(tokens, str) else getattr(tokens, "__len__", None)
    vocab = document.take(f"{arch}.vocab_size", Size, REQUIRED if count is None else count())
    window = document.take(f"{arch}.attention.sliding_window", CountOrZero | None, None)
    ids = {name: f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom")}
    bos_id, *eos_ids = (document.take(key, CountOrZero | None, None) for key in ids.values())
    unknown_id = document.take("tokenizer.ggml.unknown_token_id", CountOrZero | None, None)
    eos_ids += [id for id in eos_ids_by_name(tokens, unknown_id) if id < vocab]
    config = document.make(
        vocab=vocab,
        embed=embed,
        hidden=document.take(f"{arch}.feed_forward_length", Size),
        layers=layers,
        kv_heads=kv_heads,
        q_per_kv=per_kv(heads, kv_heads, document),
        head_dim=head_dim,
        rope_theta=shortest(document.take(f"{arch}.rope.freq_base", Base, 10000.0)),
        norm_eps=norm_eps,
        max_positions=max_positions,
        windows=(window or None,) * layers,
        tied=tied,
        routing=routing,
        latent=latent,
        bos_id=bos_id,
        eos_ids=tuple(dict.fromkeys(token for token in eos_ids if token is not None)),
        **rope,
    )
    document.refuse_rest(frozenset(f"{arch}.{key}" for key in _WITHOUT_EFFECT), prefix=f"{arch}.")
    return config


def _routing(document: Settings, arch: str) -> Routing | None:
    experts, per_token = (
        document.take(f"{arch}.{key}", CountOrZero | None, None) for key in ("expert_count", "expert_used_count")
    )
    return read_routing(document, experts or None, per_token or None, f"{arch}.expert_used_count")
