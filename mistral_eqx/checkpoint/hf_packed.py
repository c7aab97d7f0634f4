"""Quantized weights in the forms that transformers reads: bitsandbytes for NF4, compressed-tensors for the others."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import MistralConfig
from ..errors import InputError
from ..nn import AbstractWeight
from ..quant import (
    DOUBLE_SIZE,
    NF4_CODES,
    BlockWeight,
    OrderedWeight,
    ScaledWeight,
    block_format,
    double_nf4_largest,
    from_panels,
    pack,
    unpack,
)
from .names import LayerSpec
from .reader import FLOATS
from .source import file_order


Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Packing:
    """How one quantized weight is written.

    **Attributes:**

    - `config`: the `quantization_config` of a model whose layers are all quantized so, but for the layers left out.
    - `shapes`: the shape and dtype of each of its tensors, by the end of their names.
    - `arrays`: makes these tensors; the weight is copied to the host for each call.
    """

    config: dict[str, Any]
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    arrays: Callable[[], Arrays]


def packings(spec: LayerSpec, weight: AbstractWeight, config: MistralConfig) -> dict[str, Packing]:
    """Finds out how a quantized weight is written, as one linear layer or as one for each expert.

    **Returns:** by what the names of a layer's tensors begin with.

    **Raises:** `InputError` that names the layer, if neither form can hold it.
    """
    first, _, others = spec.out_dims.partition(" ")
    if first != "experts":
        return {spec.hf: _packing(spec, weight, config)}

    def of_expert(expert: int) -> Packing:
        return _packing(dataclasses.replace(spec, out_dims=others), _expert(weight, expert), config)

    # The copies of experts are made again when they are written, one after the other.
    return {
        spec.hf.replace("*", str(expert)): dataclasses.replace(
            of_expert(expert), arrays=lambda expert=expert: of_expert(expert).arrays()
        )
        for expert in range(config.experts)
    }


def _expert(weight: AbstractWeight, expert: int) -> AbstractWeight:
    """The weight of one expert of a weight of all."""
    if isinstance(weight, BlockWeight):
        return dataclasses.replace(weight, blocks=weight.blocks[expert], out_axes=weight.out_axes - 1)
    if isinstance(weight, ScaledWeight):
        scale, zero = weight.scale, weight.zero
        if weight.by == "row":
            scale, zero = scale[expert], None if zero is None else zero[expert]
        return dataclasses.replace(weight, base=_expert(weight.base, expert), scale=scale, zero=zero)
    return weight


def _packing(spec: LayerSpec, weight: AbstractWeight, config: MistralConfig) -> Packing:
    if not spec.path.endswith("_proj"):
        raise _refused(spec, "is not a linear layer of a block; leave it in floats")
    rows, inputs = spec.file_shape(config)
    order = np.argsort(file_order(spec, config, "hf"))
    if isinstance(weight, ScaledWeight) and isinstance(weight.base, BlockWeight):
        return _scaled(spec, weight, weight.base, rows, inputs, order)
    sorted_by, base = (weight, weight.base) if isinstance(weight, OrderedWeight) else (None, weight)
    if not isinstance(base, BlockWeight):
        raise _refused(spec, f"is a {type(weight).__name__}, which no such file can hold")
    kind, _, size = base.format.partition("/")
    if kind == "NF4" and sorted_by is None:
        return _nf4(base, rows, inputs, int(size), order)
    if kind == "NF4D":
        return _nf4(base, rows, inputs, DOUBLE_SIZE, order)
    if kind.startswith("INT") and size:
        return _integers(base, sorted_by, rows, inputs, int(kind.removeprefix("INT")), int(size), order)
    remedy = "write it as a GGUF file" if kind.startswith(("Q", "IQ")) else "load or quantize it another way"
    raise _refused(spec, f"has the format {base.format}, which no such file can hold; {remedy}")


def _refused(spec: LayerSpec, reason: str) -> InputError:
    return InputError(
        f"The quantized weight {spec.path!r} {reason}, or expand the model with mistral_eqx.dequantize before it is "
        "saved.",
        key=spec.path,
    )


def _fields(weight: BlockWeight, order: np.ndarray) -> list[np.ndarray]:
    """The fields of all blocks in the file's order of rows, each of shape `(rows, blocks, bytes)`."""
    return np.split(rows_of_blocks(weight)[order], np.cumsum(block_format(weight.format).fields)[:-1], axis=-1)


def rows_of_blocks(weight: BlockWeight) -> np.ndarray:
    """The blocks of a weight on the host, in the model's order of rows, shape `(rows, blocks, bytes)`."""
    format = block_format(weight.format)
    rows = math.prod(weight.blocks.shape[: weight.out_axes])
    flat = np.asarray(jax.device_get(weight.blocks)).reshape(rows, -1, weight.blocks.shape[-1])
    if weight.panel > 1:
        flat = np.asarray(from_panels(jnp.asarray(flat), format))
    return flat.reshape(rows * weight.panel, -1, format.nbytes)


def float_blocks(weight: BlockWeight) -> np.ndarray:
    """The numbers of a weight in blocks of one float, on the host, shape `(rows, inputs)`."""
    return rows_of_blocks(weight).view(FLOATS[weight.format])[..., 0]


def _single(field: np.ndarray) -> np.ndarray:
    """A field of 4 bytes as floats, without an axis of its own."""
    return np.ascontiguousarray(field).view(np.float32)[..., 0]


def _nf4(weight: BlockWeight, rows: int, inputs: int, size: int, order: np.ndarray) -> Packing:
    state = {"quant_type": "nf4", "blocksize": size, "dtype": "float32", "shape": [rows, inputs]}
    described = np.frombuffer(json.dumps(state).encode(), np.uint8)

    def arrays() -> Arrays:
        if weight.format.startswith("NF4D"):
            # The file has rows in another order, in which scales with the same factor are not side by side.
            *scales, codes = _fields(weight, order)
            largest = np.asarray(double_nf4_largest(inputs // size, *map(jnp.asarray, scales)))
        else:
            field, codes = _fields(weight, order)
            largest = _single(field)
        return {
            "weight": codes.reshape(-1, 1),
            "weight.absmax": largest.reshape(-1),
            "weight.quant_map": NF4_CODES,
            "weight.quant_state.bitsandbytes__nf4": described,
        }

    shapes = {
        "weight": ((rows * inputs // 2, 1), np.dtype(np.uint8)),
        "weight.absmax": ((rows * inputs // size,), np.dtype(np.float32)),
        "weight.quant_map": ((16,), np.dtype(np.float32)),
        "weight.quant_state.bitsandbytes__nf4": ((len(described),), np.dtype(np.uint8)),
    }
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }
    return Packing(config, shapes, arrays)


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of the last axis in 32-bit words, the first one lowest; the last word may have room."""
    packed = pack(codes, bits)
    room = -packed.shape[-1] % 4
    return np.ascontiguousarray(np.pad(packed, [*[(0, 0)] * (packed.ndim - 1), (0, room)])).view("<i4")


def _integers(
    weight: BlockWeight,
    sorted_by: OrderedWeight | None,
    rows: int,
    inputs: int,
    bits: int,
    size: int,
    order: np.ndarray,
) -> Packing:
    groups, middle = inputs // size, 2 ** (bits - 1)
    symmetric = bool((_fields(weight, order)[1] == middle).all())

    def arrays() -> Arrays:
        scale, zero, packed = _fields(weight, order)
        codes = unpack(packed.reshape(rows, -1), bits)
        found: dict[str, np.ndarray] = {
            "weight_scale": _single(scale),
            "weight_shape": np.array([rows, inputs], np.int64),
        }
        if not symmetric:
            found["weight_zero_point"] = _words(zero[..., 0].T, bits).T
        if sorted_by is not None:
            inverse = np.asarray(sorted_by.inverse)
            codes = codes[:, inverse]
            found["weight_g_idx"] = (inverse // size).astype(np.int32)
        return {"weight_packed": _words(codes, bits), **found}

    shapes = {
        "weight_packed": ((rows, -(-inputs * bits // 32)), np.dtype(np.int32)),
        "weight_scale": ((rows, groups), np.dtype(np.float32)),
        "weight_shape": ((2,), np.dtype(np.int64)),
    }
    if not symmetric:
        shapes["weight_zero_point"] = ((-(-rows * bits // 32), groups), np.dtype(np.int32))
    if sorted_by is not None:
        shapes["weight_g_idx"] = ((inputs,), np.dtype(np.int32))
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": size,
        "actorder": None if sorted_by is None else "group",
    }
    return Packing(_compressed("pack-quantized", weights), shapes, arrays)


def _scaled(
    spec: LayerSpec, weight: ScaledWeight, base: BlockWeight, rows: int, inputs: int, order: np.ndarray
) -> Packing:
    if base.format not in ("INT8", "FP8") or weight.by == "column" or weight.zero is not None:
        what = "zero points" if weight.zero is not None else f"a scale for each {weight.by}"
        raise _refused(spec, f"is in {base.format} with {what}, which no such file can hold; quantize it another way")
    by_row, dtype = weight.by == "row", np.dtype(jnp.float8_e4m3fn)

    def scales() -> np.ndarray:
        scale = np.asarray(jax.device_get(weight.scale), np.float32).reshape(-1)
        return scale[order, None] if by_row else scale

    def codes() -> np.ndarray:
        (found,) = _fields(base, order)
        return np.ascontiguousarray(found[..., 0])

    shape = ((rows, 1) if by_row else (1,), np.dtype(np.float32))
    weights: dict[str, Any] = {"num_bits": 8, "symmetric": True, "strategy": "channel" if by_row else "tensor"}
    if base.format == "FP8":
        shapes = {"weight": ((rows, inputs), dtype), "weight_scale": shape}
        config = _compressed("float-quantized", {**weights, "type": "float"})
        return Packing(config, shapes, lambda: {"weight": codes().view(dtype), "weight_scale": scales()})
    # Whole numbers are packed if activations are not rounded.
    shapes = {
        "weight_packed": ((rows, -(-inputs // 4)), np.dtype(np.int32)),
        "weight_scale": shape,
        "weight_shape": ((2,), np.dtype(np.int64)),
    }

    def arrays() -> Arrays:
        size = np.array([rows, inputs], np.int64)
        return {"weight_packed": _words(codes() ^ 0x80, 8), "weight_scale": scales(), "weight_shape": size}

    return Packing(_compressed("pack-quantized", {**weights, "type": "int"}), shapes, arrays)


def _compressed(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


def whole_config(packings: Mapping[str, Packing], left_out: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model.

    **Arguments:**

    - `packings`: by the names of the layers.
    - `left_out`: the names of the linear layers that are not quantized.

    **Raises:** `InputError` if layers are quantized in more than one way, which transformers would need a group for.
    """
    (path, first), *others = packings.items()
    for other, found in others:
        if found.config != first.config:
            raise InputError(
                f"The layers {path!r} and {other!r} are quantized in two ways, and a folder can hold one; quantize all "
                "layers alike, or expand the model with mistral_eqx.dequantize before it is saved."
            )
    key = "llm_int8_skip_modules" if first.config["quant_method"] == "bitsandbytes" else "ignore"
    return {**first.config, key: left_out}
