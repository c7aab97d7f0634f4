"""Writes a GGUF file that llama.cpp runs."""

import abc
import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import gguf
import numpy as np
from gguf import GGUFValueType

from ..config import MistralConfig
from ..errors import InputError
from ..quant import GGUF, MIXTURES, block_format, fitting_type, mixed_type
from .gguf_latent import divided, divided_tensors, is_divided, write_latent
from .gguf_rope import DIVISORS, architecture, divisors, write_rope
from .names import EMBEDDING, HEAD, LayerSpec, layer_specs
from .staging import hidden_beside, make_folder, naming, restore


@runtime_checkable
class Vocabulary(Protocol):
    """What is written of a tokenizer."""

    def gguf_metadata(self) -> dict[str, Any]:
        """The keys and values."""
        ...


class AbstractWeights(abc.ABC):
    """The weights of a model, which are asked for once each, in the order of the file."""

    @abc.abstractmethod
    def blocks(self, spec: LayerSpec, type: str) -> np.ndarray | None:
        """The bytes of a weight that is in this type already, a row in each row; `None` if it is in another."""

    @abc.abstractmethod
    def numbers(self, spec: LayerSpec) -> Iterator[np.ndarray]:
        """The rows of a weight in floats, a chunk at a time."""


# The package's names of file types that are not `MOSTLY_` and the name of a type or mixture.
_FILE_TYPES = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
_FILE_TYPES |= {f"Q{bits}_K": f"MOSTLY_Q{bits}_K_S" for bits in (3, 4, 5)}


def write_gguf(
    path: str | os.PathLike[str],
    config: MistralConfig,
    weights: AbstractWeights,
    types: Mapping[str, str],
    tokenizer: Vocabulary,
    *,
    type: str,
    overwrite: bool,
):
    """Writes a model and its tokenizer.

    **Arguments:**

    - `path`: the file. It appears when it is complete.
    - `config`: the model's sizes.
    - `weights`: the weights.
    - `types`: the type of each weight, by its path.
    - `tokenizer`: the tokenizer.
    - `type`: the mixture, or the type of most of them.
    - `overwrite`: whether to replace an existing GGUF file.

    **Raises:** `InputError` if the file may not or cannot be written.
    """
    path = Path(path).expanduser().resolve()
    expect_free_file(path, overwrite)
    metadata = {**_config_metadata(config, type), **tokenizer.gguf_metadata()}
    if (tokens := len(metadata["tokenizer.ggml.tokens"])) != config.vocab:
        # A vocabulary may be padded: the rest of the table has names that are no text.
        metadata = _padded(metadata, tokens, config.vocab)
    make_folder(path.parent)
    restore(path)
    with hidden_beside(path, path) as folder:
        file = folder / path.name
        with naming(file), contextlib.closing(gguf.GGUFWriter(file, architecture(config))) as writer:
            for key, value in metadata.items():
                _add(writer, key, value)
            specs = list(layer_specs(config))
            for spec in specs:
                for name, shape, kind in _tensors(spec, config, types[spec.path]):
                    format = block_format(kind)
                    stored = (*shape[:-1], shape[-1] // format.size * format.nbytes)
                    number = gguf.GGMLQuantizationType[kind]
                    writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), number)
            if (of_angles := divisors(config)) is not None:
                writer.add_tensor_info(DIVISORS, of_angles.shape, of_angles.dtype, of_angles.nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for spec in specs:
                for raw in _bytes(weights, spec, config, types[spec.path]):
                    writer.write_tensor_data(raw)
            if of_angles is not None:
                writer.write_tensor_data(of_angles)
        os.replace(file, path)


def expect_free_file(path: Path, overwrite: bool):
    """Raises an `InputError` if a file exists and may not be replaced."""
    if path.is_dir():
        raise InputError(
            f"{str(path)!r} is a folder, but a GGUF model is one file; give the path of a file.", file=path
        )
    if not path.exists():
        return
    if not overwrite:
        raise InputError(f"{str(path)!r} exists; give another path, or allow it to be replaced (overwrite).", file=path)
    with open(path, "rb") as file:
        if file.read(4) not in (b"GGUF", b""):
            raise InputError(f"{str(path)!r} is not a GGUF file and would be lost; give another path.", file=path)


def chosen_types(config: MistralConfig, type: str, kept: Mapping[str, str]) -> dict[str, str]:
    """The type of each weight.

    Norms are `F32`. Unless the type is a mixture, the embedding and the head have at least 8 bits. A weight whose rows
    blocks of 256 numbers do not divide has blocks of 32, and `F16` if these do not divide them either.

    **Arguments:**

    - `type`: the type that the file is named after; mixtures before types.
    - `kept`: the types of weights that are quantized already, by their paths.
    """
    found: dict[str, str] = {}
    for spec in layer_specs(config):
        if not spec.in_dims or "routes" in spec.dims:
            found[spec.path] = "F32"
        elif spec.path in kept:
            # The blocks of a weight in two tensors cannot be kept, but the numbers can.
            found[spec.path] = "F32" if is_divided(spec) else kept[spec.path]
        elif type in MIXTURES:
            found[spec.path] = mixed_type(type, spec.path, config)
        else:
            eight_bits = spec in (EMBEDDING, HEAD) and type not in ("F32", "F16", "BF16")
            found[spec.path] = fitting_type("Q8_0" if eight_bits else type, spec.file_shape(config)[1])
    return found


def _tensors(spec: LayerSpec, config: MistralConfig, kind: str) -> list[tuple[str, tuple[int, ...], str]]:
    """The name, shape and type of each tensor of the file that holds a weight. The matrices of experts are stacked."""
    if is_divided(spec):
        return divided_tensors(spec, config, kind)
    rows, *inner = spec.file_shape(config)
    stacked = "experts" in spec.dims.split()
    return [(spec.name("gguf"), (config.experts, rows // config.experts, *inner) if stacked else (rows, *inner), kind)]


def _bytes(weights: AbstractWeights, spec: LayerSpec, config: MistralConfig, kind: str) -> Iterator[np.ndarray]:
    """The content of each of these tensors."""
    if is_divided(spec):
        parts = divided(np.concatenate(list(weights.numbers(spec))), config)
        tensors = divided_tensors(spec, config, kind)
        yield from (_blocks(part, own) for part, (*_, own) in zip(parts, tensors, strict=True))
    elif (kept := weights.blocks(spec, kind)) is not None:
        yield kept
    else:
        yield np.concatenate([_blocks(chunk, kind) for chunk in weights.numbers(spec)])


def _blocks(numbers: np.ndarray, kind: str) -> np.ndarray:
    return GGUF(kind).blocks(numbers.astype(np.float32).reshape(len(numbers), -1, block_format(kind).size))


def _config_metadata(config: MistralConfig, type: str) -> dict[str, Any]:
    windows = set(config.windows)
    if len(windows) > 1:
        raise InputError(
            "Some layers have windows and others have none, or another size, which a GGUF file of this architecture "
            "cannot say; write another format."
        )
    (window,) = windows
    arch = architecture(config)
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.file_type": int(gguf.LlamaFileType[_FILE_TYPES.get(type, f"MOSTLY_{type}")]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        f"{arch}.block_count": config.layers,
        f"{arch}.context_length": config.max_positions,
        f"{arch}.embedding_length": config.embed,
        f"{arch}.feed_forward_length": config.hidden,
        f"{arch}.attention.head_count": config.q_heads,
        f"{arch}.attention.head_count_kv": config.kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": float(config.rope_theta),
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{arch}.vocab_size": config.vocab,
    }
    if config.routing is not None:
        metadata[f"{arch}.expert_count"] = config.routing.experts
        metadata[f"{arch}.expert_used_count"] = config.routing.per_token
    if window is not None:
        metadata[f"{arch}.attention.sliding_window"] = window
    if config.latent is not None:
        metadata |= {f"{arch}.{key}": value for key, value in write_latent(config, config.latent).items()}
    return metadata | write_rope(config)


def _padded(metadata: dict[str, Any], tokens: int, vocab: int) -> dict[str, Any]:
    if tokens > vocab:
        raise InputError(
            f"The tokenizer has {tokens} tokens, but the model's table {vocab} rows; give the model's own tokenizer."
        )
    more: dict[str, list[Any]] = {"tokens": [f"[PAD{id}]" for id in range(tokens, vocab)]}
    more |= {"scores": [0.0] * (vocab - tokens), "token_type": [int(gguf.TokenType.UNUSED)] * (vocab - tokens)}
    extended = {f"tokenizer.ggml.{key}": values for key, values in more.items()}
    return {key: [*value, *extended[key]] if key in extended else value for key, value in metadata.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        kind = GGUFValueType.get_type(value[0]) if value else GGUFValueType.STRING
        writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=kind)
