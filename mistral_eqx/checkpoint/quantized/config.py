"""The key `quantization_config` of a `config.json`."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge

from ...documents import shown
from ..settings import Settings, listed
from .bitsandbytes import BitsAndBytes4, BitsAndBytes8
from .compressed import CompressedTensors
from .float8 import FP8Weights
from .groups import AWQ, GPTQ
from .parts import Quantization


Size = Annotated[int, Ge(1)]


def read_quantization(
    settings: Mapping[str, Any] | None, *, file: str | os.PathLike[str] | None = None
) -> Quantization | None:
    """Reads the key `quantization_config` of a `config.json`.

    **Arguments:**

    - `settings`: the value of the key.
    - `file`: the path of the config, for error messages.

    **Raises:** `ValueError` that names the key, if a method is unknown or needs something that is not supported.
    """
    if not settings:
        return None
    document = Settings(settings, "config.json", file)
    method = document.take("quant_method", str | None, None)
    if method is None and document.take("load_in_4bit", bool, False):
        method = "bitsandbytes"
    read = _METHODS.get(method or "")
    if read is None:
        raise document.wrong(
            "quantization_config",
            f"{document.name} has the quantization method {shown(method)}, which is not supported; the supported ones "
            f"are {listed(_METHODS)}.",
        )
    return read(document)


def _bitsandbytes(document: Settings) -> Quantization:
    if document.take("load_in_8bit", bool, False):
        return BitsAndBytes8()
    document.expect("bnb_4bit_quant_type", ("nf4",), "fp4")
    return BitsAndBytes4()


def _gptq(document: Settings) -> Quantization:
    bits = document.take("bits", Literal[2, 3, 4, 8])
    stored = document.take("checkpoint_format", Literal["gptq", "gptq_v2"], "gptq")
    return GPTQ(bits, _group_size(document), stored == "gptq_v2")


def _awq(document: Settings) -> Quantization:
    bits = document.take("bits", int | None, None) or document.take("w_bit", int, 4)
    version = document.take("version", str, "gemm").lower()
    if bits != 4 or version != "gemm":
        raise document.wrong(
            "quantization_config",
            f"{document.name} has AWQ weights of {bits} bits in the layout {shown(version)}, which are not supported; "
            "supported are 4 bits in 'gemm'.",
        )
    return AWQ(_group_size(document))


def _group_size(document: Settings) -> int:
    size = document.take("group_size", int | None, None)
    size = document.take("q_group_size", int, 128) if size is None else size
    if size != -1 and size < 1:
        raise document.wrong(
            "group_size", f"{document.name} has group_size {size}; it must be positive, or -1 for whole rows."
        )
    return size


def _fp8(document: Settings) -> Quantization:
    block = document.take("weight_block_size", list[Size] | None, None)
    if block is not None and len(block) != 2:
        raise document.refuse("weight_block_size", block)
    return FP8Weights(None if block is None else (block[0], block[1]))


def _compressed_tensors(document: Settings) -> Quantization:
    document.expect("quantization_status", ("compressed", "frozen", None), None)
    groups = document.take("config_groups", dict[str, dict[str, Any]])
    kinds = [Settings(group.get("weights") or {}, document.name, document.file) for group in groups.values()]
    if len(kinds) != 1:
        raise document.wrong(
            "config_groups",
            f"{document.name} has {len(kinds)} groups of layers with a quantization of their own; one is supported.",
        )
    (kind,) = kinds
    bits = kind.take("num_bits", Literal[2, 3, 4, 5, 6, 7, 8])
    kind.take("type", Literal["int", "float"])
    return CompressedTensors(bits)


_METHODS = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}
