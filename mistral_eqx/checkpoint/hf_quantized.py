"""Quantized Hugging Face folders: bitsandbytes, GPTQ, AWQ, compressed-tensors and FP8.

Each has its own tensors for a weight. Here they become one tensor in the blocks of this package, with the same codes
and scales: nothing is quantized anew. Activations are not rounded, even where a config says that they are.
"""

import abc
import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from ..checks import checked
from ..documents import parse_json, shown
from ..errors import InputError
from ..quant import NF4_CODES, integer_blocks, nf4_blocks
from .block_tensor import BlockTensor
from .reader import LazyTensor
from .settings import Settings, listed


_Size = Annotated[int, Ge(1)]
_Tensors = Mapping[str, LazyTensor]


class Quantization(abc.ABC):
    """How a checkpoint is quantized."""

    # The tensors of a weight, by the end of their names.
    parts: tuple[str, ...]

    @abc.abstractmethod
    def weight(self, name: str, parts: "Parts") -> LazyTensor:
        """One tensor of several.

        **Arguments:**

        - `name`: the name that it would have in a checkpoint that is not quantized.
        - `parts`: its tensors, by the end of their names.
        """

    def combined(self, tensors: _Tensors) -> dict[str, LazyTensor]:
        """All tensors of a checkpoint, those of each quantized weight as one."""
        found: dict[str, dict[str, LazyTensor]] = {}
        result: dict[str, LazyTensor] = {}
        ends = sorted(self.parts, key=len, reverse=True)
        for name, tensor in tensors.items():
            end = next((end for end in ends if name.endswith(f".{end}")), None)
            if end is None:
                result[name] = tensor
            else:
                found.setdefault(name.removesuffix(f".{end}"), {})[end] = tensor
        for stem, own in found.items():
            name = f"{stem}.weight"
            # Norms and layers that are not quantized have a weight and nothing else.
            plain = set(own) == {"weight"} and own["weight"].dtype.kind not in "iu" and own["weight"].dtype.itemsize > 1
            result[name] = own["weight"] if plain else self.weight(name, Parts(stem, own))
        return result


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tensors of a quantized weight.

    **Attributes:**

    - `stem`: what their names begin with.
    - `tensors`: the tensors by the end of their names.
    """

    stem: str
    tensors: Mapping[str, LazyTensor]

    def take(self, end: str, dtype: str, axes: int | None = None) -> LazyTensor:
        """A tensor of the weight, checked against its kind of numbers.

        **Arguments:**

        - `end`: the end of its name.
        - `dtype`: the name of a numpy dtype, or `"float"` for any float of 16 or 32 bits.
        - `axes`: how many axes it must have; any number unless given.
        """
        if end not in self.tensors:
            raise InputError(
                f"The weight {self.stem!r} has no tensor {f'{self.stem}.{end}'!r}, which its quantization requires; "
                "fetch the checkpoint again.",
                key=f"{self.stem}.{end}",
            )
        tensor = self.tensors[end]
        fits = (
            tensor.dtype.name in ("float32", "float16", "bfloat16") if dtype == "float" else tensor.dtype.name == dtype
        )
        if not fits or (axes is not None and len(tensor.shape) != axes):
            wanted = dtype if axes is None else f"{dtype} with {axes} axes"
            raise InputError(
                f"The tensor {f'{self.stem}.{end}'!r} is {tensor.dtype.name} of shape {tensor.shape}, but its "
                f"quantization requires {wanted}; the config belongs to another checkpoint.",
                key=f"{self.stem}.{end}",
            )
        return tensor

    def has(self, end: str) -> bool:
        """Whether there is such a tensor."""
        return end in self.tensors

    @property
    def nbytes(self) -> int:
        """The size of all of them in the files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def expect(self, fits: bool, what: str):
        """Refuses tensors that do not fit each other."""
        if not fits:
            shapes = ", ".join(f"{end} {tensor.shape}" for end, tensor in self.tensors.items())
            raise InputError(
                f"The tensors of the weight {self.stem!r} do not fit each other ({shapes}): {what}; fetch the "
                "checkpoint again.",
                key=f"{self.stem}.weight",
            )


def _all(tensor: LazyTensor) -> np.ndarray:
    return tensor.rows(0, tensor.shape[0])


def _columns(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
    """All rows of some columns."""
    return tensor.rows(0, tensor.shape[0], np.arange(start, stop))


def _f32(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
    return tensor.rows(start, stop).astype(np.float32)


def _stream(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes in 32-bit words of the last axis, one after the other, the lowest bit first."""
    single = np.unpackbits(np.ascontiguousarray(words, "<i4").view(np.uint8), axis=-1, bitorder="little")
    single = single.reshape(*words.shape[:-1], -1, bits)
    return (single << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)


# ---- bitsandbytes ----


class BitsAndBytes4(Quantization):
    """NF4, with the largest sizes of blocks in float32, or quantized to 8 bits (double quantization)."""

    parts = (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
        "weight.quant_state.bitsandbytes__fp4",
    )

    def weight(self, name: str, parts: Parts) -> LazyTensor:
        if parts.has("weight.quant_state.bitsandbytes__fp4"):
            raise InputError(
                f"The weight {parts.stem!r} is in bitsandbytes' fp4, which is not supported; use a checkpoint in nf4.",
                key=name,
            )
        state = self._state(parts)
        (rows, inputs), size = state["shape"], state["blocksize"]
        codes, absmax = (
            parts.take("weight", "uint8"),
            parts.take("weight.absmax", "uint8" if state["nested"] else "float"),
        )
        if inputs % size or size % 2:
            raise InputError(
                f"The weight {parts.stem!r} has {inputs} inputs in blocks of {size}, so that blocks go on in the next "
                "row, which is not supported; use a checkpoint with smaller blocks.",
                key=name,
            )
        count = inputs // size
        fits = codes.shape in ((rows * inputs // 2, 1), (rows * inputs // 2,)) and rows * inputs % 2 == 0
        parts.expect(fits, f"the weight has shape {(rows, inputs)}")
        parts.expect(absmax.shape == (rows * count,), f"there are {rows * count} blocks")
        table = _all(parts.take("weight.quant_map", "float")).astype(np.float32).reshape(-1)
        parts.expect(np.array_equal(table, NF4_CODES), "quant_map is not that of nf4")
        largest = self._largest(parts, absmax, state)

        def read(start: int, stop: int) -> np.ndarray:
            raw = codes.rows(start * inputs // 2, stop * inputs // 2).reshape(stop - start, count, size // 2)
            pairs = np.stack([raw >> 4, raw & 15], axis=-1).reshape(stop - start, count, size)
            return nf4_blocks(pairs, largest(start * count, stop * count).reshape(stop - start, count, 1))

        return BlockTensor(name, (rows, inputs), f"NF4/{size}", read, parts.nbytes)

    def _state(self, parts: Parts) -> dict[str, Any]:
        raw = _all(parts.take("weight.quant_state.bitsandbytes__nf4", "uint8")).tobytes()
        what = f"The tensor {f'{parts.stem}.weight.quant_state.bitsandbytes__nf4'!r}"
        try:
            state = parse_json(raw.decode(), "its content")
        except (InputError, UnicodeDecodeError) as error:
            raise InputError(f"{what} is not JSON; fetch the checkpoint again.", key=parts.stem) from error

        def of(key: str, kind: Any) -> Any:
            found = state.get(key) if isinstance(state, dict) else None
            return checked(found, kind, f"{key!r} in {what}", key=parts.stem, remedy="fetch the checkpoint again")

        nested = isinstance(state, dict) and state.get("nested_blocksize") is not None
        shape = of("shape", list[_Size])
        parts.expect(len(shape) == 2, f"the weight has shape {tuple(shape)}")
        return {
            "shape": shape,
            "blocksize": of("blocksize", _Size),
            "nested": nested,
            "nested_blocksize": of("nested_blocksize", _Size) if nested else 0,
            "nested_offset": of("nested_offset", float) if nested else 0.0,
        }

    def _largest(self, parts: Parts, absmax: LazyTensor, state: dict[str, Any]) -> Any:
        if not state["nested"]:
            return functools.partial(_f32, absmax)
        scales = _all(parts.take("weight.nested_absmax", "float32", 1))
        table = _all(parts.take("weight.nested_quant_map", "float32", 1))
        parts.expect(len(table) == 256, "nested_quant_map must have 256 entries")
        parts.expect(len(scales) * state["nested_blocksize"] >= math.prod(absmax.shape), "nested_absmax is too short")

        def read(start: int, stop: int) -> np.ndarray:
            scale = scales[np.arange(start, stop) // state["nested_blocksize"]]
            return table[absmax.rows(start, stop).reshape(-1)] * scale + np.float32(state["nested_offset"])

        return read


class BitsAndBytes8(Quantization):
    """Whole numbers of 8 bits with a scale for each row."""

    parts = ("weight", "SCB", "weight_format")

    def weight(self, name: str, parts: Parts) -> LazyTensor:
        codes, scale = parts.take("weight", "int8", 2), parts.take("SCB", "float", 1)
        parts.expect(scale.shape == codes.shape[:1], "SCB must have an entry for each row")
        return _scaled(name, "INT8", codes, _Scaled(scale, 1 / 127), parts)


# ---- GPTQ and AWQ ----


@dataclasses.dataclass(frozen=True)
class GPTQ(Quantization):
    """Groups of inputs with a scale and a zero; with `desc_act`, inputs belong to groups in any order.

    **Attributes:**

    - `bits`, `group_size`: of a code, and how many inputs share a scale; -1 for all of them.
    - `v2`: whether zeros are stored as they are, and not less one.
    """

    bits: int
    group_size: int
    v2: bool
    parts = ("qweight", "qzeros", "scales", "g_idx", "weight")

    def weight(self, name: str, parts: Parts) -> LazyTensor:
        words, scales, zeros = (parts.take(end, kind, 2) for end, kind in _GPTQ)
        inputs, rows = words.shape[0] * 32 // self.bits, words.shape[1]
        whole = words.shape[0] * 32 % self.bits == 0 and rows * self.bits % 32 == 0
        parts.expect(whole, f"words hold codes of {self.bits} bits")
        size = inputs if self.group_size == -1 else self.group_size
        parts.expect(inputs % size == 0 and size % 8 == 0, f"groups of {size} must divide {inputs} inputs")
        groups = inputs // size
        parts.expect(scales.shape == (groups, rows), f"scales must have shape {(groups, rows)}")
        width = rows * self.bits // 32
        parts.expect(zeros.shape == (groups, width), f"qzeros must have shape {(groups, width)}")
        order = _order(parts, "g_idx", inputs, size)
        every_zero = functools.cache(lambda: _stream(_all(zeros), self.bits))

        def read(start: int, stop: int) -> np.ndarray:
            codes = _stream(np.ascontiguousarray(_columns(words, start, stop).T), self.bits)
            codes = codes if order is None else codes[:, order]
            zero = every_zero()[:, start:stop].T + np.uint8(0 if self.v2 else 1)
            scale = _columns(scales, start, stop).astype(np.float32).T
            return integer_blocks(
                codes.reshape(stop - start, groups, size), scale[..., None], zero[..., None], self.bits
            )

        return BlockTensor(name, (rows, inputs), f"INT{self.bits}/{size}", read, parts.nbytes, order=order)


_GPTQ = (("qweight", "int32"), ("scales", "float"), ("qzeros", "int32"))
# Which output each 4 bits of a word of AWQ belong to, from the lowest.
_AWQ_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


@dataclasses.dataclass(frozen=True)
class AWQ(Quantization):
    """Groups of inputs in 4 bits with a scale and a zero, in the layout that AutoAWQ calls gemm."""

    group_size: int
    parts = ("qweight", "qzeros", "scales", "weight")

    def weight(self, name: str, parts: Parts) -> LazyTensor:
        words, scales, zeros = (parts.take(end, kind, 2) for end, kind in _GPTQ)
        inputs, rows = words.shape[0], words.shape[1] * 8
        size = inputs if self.group_size == -1 else self.group_size
        parts.expect(inputs % size == 0 and size % 8 == 0, f"groups of {size} must divide {inputs} inputs")
        groups = inputs // size
        parts.expect(scales.shape == (groups, rows), f"scales must have shape {(groups, rows)}")
        parts.expect(zeros.shape == (groups, words.shape[1]), f"qzeros must have shape {(groups, words.shape[1])}")

        def of_rows(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
            first, last = start // 8, -(-stop // 8)
            codes = _stream(_columns(tensor, first, last), 4).reshape(tensor.shape[0], -1, 8)
            codes = codes[:, :, np.argsort(_AWQ_ORDER)].reshape(tensor.shape[0], -1)
            return codes[:, start - 8 * first : stop - 8 * first].T

        def read(start: int, stop: int) -> np.ndarray:
            codes = np.ascontiguousarray(of_rows(words, start, stop)).reshape(stop - start, groups, size)
            scale = _columns(scales, start, stop).astype(np.float32).T
            return integer_blocks(codes, scale[..., None], of_rows(zeros, start, stop)[..., None], 4)

        return BlockTensor(name, (rows, inputs), f"INT4/{size}", read, parts.nbytes)


# ---- FP8 and compressed-tensors ----


@dataclasses.dataclass(frozen=True)
class FP8Weights(Quantization):
    """Floats of 8 bits (e4m3) with a scale for all, or for each block of rows and columns.

    **Attributes:**

    - `block`: rows and columns of a block; `None` for one scale.
    """

    block: tuple[int, int] | None
    parts = ("weight", "weight_scale_inv", "activation_scale")

    def weight(self, name: str, parts: Parts) -> LazyTensor:
        codes, scale = parts.take("weight", "float8_e4m3fn", 2), parts.take("weight_scale_inv", "float")
        if self.block is None:
            parts.expect(math.prod(scale.shape) == 1, "weight_scale_inv must have one entry")
            return _scaled(name, "FP8", codes, float(_scalar(scale)), parts)
        (rows, inputs), (height, width) = codes.shape, self.block
        parts.expect(
            scale.shape == (-(-rows // height), -(-inputs // width)), f"blocks have {height} x {width} numbers"
        )
        if inputs % width:
            raise InputError(
                f"The weight {parts.stem!r} has {inputs} inputs in blocks of {width}, of which the last is not whole, "
                "which is not supported.",
                key=name,
            )
        every_scale = functools.cache(lambda: _all(scale).astype(np.float32))

        def read(start: int, stop: int) -> np.ndarray:
            raw = codes.rows(start, stop).view(np.uint8).reshape(stop - start, -1, width)
            own = every_scale()[np.arange(start, stop) // height]
            return np.concatenate([np.ascontiguousarray(own[..., None]).view(np.uint8), raw], axis=-1)

        return BlockTensor(name, (rows, inputs), f"FP8/{width}", read, parts.nbytes)


@dataclasses.dataclass(frozen=True)
class CompressedTensors(Quantization):
    """Weights as the package compressed-tensors writes them: INT8, FP8, 4-bit integers and NVFP4.

    **Attributes:**

    - `bits`: of a whole number.
    """

    bits: int
    parts = (
        "weight",
        "weight_scale",
        "weight_zero_point",
        "weight_packed",
        "weight_shape",
        "weight_g_idx",
        "weight_global_scale",
        "input_global_scale",
        "input_scale",
        "input_zero_point",
    )

    def weight(self, name: str, parts: Parts) -> LazyTensor:
        if parts.has("weight_global_scale"):
            return self._nvfp4(name, parts)
        if parts.has("weight_packed"):
            return self._packed(name, parts)
        kind = parts.take("weight", parts.tensors["weight"].dtype.name if parts.has("weight") else "int8", 2)
        if kind.dtype.name not in ("int8", "float8_e4m3fn"):
            raise InputError(
                f"The weight {parts.stem!r} has a scale but is {kind.dtype.name}, which is not supported; supported "
                "are int8 and float8_e4m3fn.",
                key=name,
            )
        scale = parts.take("weight_scale", "float")
        format = "INT8" if kind.dtype.name == "int8" else "FP8"
        if parts.has("weight_zero_point") and np.any(_all(parts.tensors["weight_zero_point"]) != 0):
            raise InputError(
                f"The weight {parts.stem!r} has zero points for whole rows, which are not supported; use a "
                "symmetric one.",
                key=name,
            )
        if math.prod(scale.shape) == 1:
            return _scaled(name, format, kind, float(_scalar(scale)), parts)
        rows, inputs = kind.shape
        if scale.shape in ((rows,), (rows, 1)):
            return _scaled(name, format, kind, _Scaled(scale, 1.0), parts)
        parts.expect(
            len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] > 0 and inputs % scale.shape[1] == 0,
            "one scale a group",
        )
        size = inputs // scale.shape[1]

        def read(start: int, stop: int) -> np.ndarray:
            raw = kind.rows(start, stop).view(np.uint8).reshape(stop - start, -1, size)
            own = _f32(scale, start, stop)[..., None]
            if format == "INT8":
                return integer_blocks(raw ^ 0x80, own, np.full(own.shape, 128, np.uint8), 8)
            return np.concatenate([np.ascontiguousarray(own).view(np.uint8), raw], axis=-1)

        return BlockTensor(name, (rows, inputs), f"{format}/{size}", read, parts.nbytes)

    def _packed(self, name: str, parts: Parts) -> LazyTensor:
        words, scale = parts.take("weight_packed", "int32", 2), parts.take("weight_scale", "float", 2)
        shape = parts.take("weight_shape", "int64", 1)
        parts.expect(shape.shape == (2,), "weight_shape has two sizes")
        rows, inputs = (int(size) for size in _all(shape))
        per_word = 32 // self.bits
        parts.expect(words.shape == (rows, -(-inputs // per_word)), f"weight_packed holds {per_word} numbers a word")
        whole = scale.shape[0] == rows and scale.shape[1] > 0 and inputs % scale.shape[1] == 0
        parts.expect(whole, "weight_scale has one scale a group")
        groups, size = scale.shape[1], inputs // scale.shape[1]
        order = _order(parts, "weight_g_idx", inputs, size)
        zeros = parts.take("weight_zero_point", "int32", 2) if parts.has("weight_zero_point") else None
        if zeros is not None:
            parts.expect(zeros.shape == (-(-rows // per_word), groups), "weight_zero_point holds a word of each group")

        def unpacked(words: np.ndarray) -> np.ndarray:
            shifts = np.arange(per_word, dtype=np.uint32) * self.bits
            codes = (words.view(np.uint32)[..., None] >> shifts) & (2**self.bits - 1)
            return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)

        every_zero = functools.cache(lambda: None if zeros is None else unpacked(np.ascontiguousarray(_all(zeros).T)))

        if groups == 1 and self.bits == 8 and zeros is None and order is None:
            # A row's scale stands beside the codes, so that devices can split the row.
            def signed(start: int, stop: int) -> np.ndarray:
                return (unpacked(words.rows(start, stop))[:, :inputs] ^ 0x80)[..., None]

            return BlockTensor(name, (rows, inputs), "INT8", signed, parts.nbytes, _Scaled(scale, 1.0))

        def read(start: int, stop: int) -> np.ndarray:
            codes = unpacked(words.rows(start, stop))[:, :inputs]
            codes = codes if order is None else codes[:, order]
            found = every_zero()
            zero = (
                np.full((groups, stop - start), 2 ** (self.bits - 1), np.uint8)
                if found is None
                else found[:, start:stop]
            )
            own = _f32(scale, start, stop)[..., None]
            return integer_blocks(codes.reshape(stop - start, groups, size), own, zero.T[..., None], self.bits)

        return BlockTensor(name, (rows, inputs), f"INT{self.bits}/{size}", read, parts.nbytes, order=order)

    def _nvfp4(self, name: str, parts: Parts) -> LazyTensor:
        codes, scale = parts.take("weight_packed", "uint8", 2), parts.take("weight_scale", "float8_e4m3fn", 2)
        rows, inputs = codes.shape[0], codes.shape[1] * 2
        parts.expect(scale.shape == (rows, inputs // 16) and inputs % 16 == 0, "16 numbers share a scale")

        def read(start: int, stop: int) -> np.ndarray:
            raw = codes.rows(start, stop).reshape(stop - start, -1, 8)
            return np.concatenate([scale.rows(start, stop).view(np.uint8)[..., None], raw], axis=-1)

        overall = parts.take("weight_global_scale", "float")
        parts.expect(math.prod(overall.shape) == 1, "weight_global_scale must have one entry")
        with np.errstate(divide="ignore"):
            factor = float(np.float32(1) / _scalar(overall))
        return BlockTensor(name, (rows, inputs), "NVFP4", read, parts.nbytes, factor)


def _order(parts: Parts, end: str, inputs: int, size: int) -> np.ndarray | None:
    """The inputs group after group, by the group of each; `None` if they are so already."""
    if not parts.has(end):
        return None
    group = _all(parts.take(end, "int32", 1))
    full = len(group) == inputs and np.array_equal(np.sort(group), np.arange(inputs) // size)
    parts.expect(full, f"{end} must give each of {inputs // size} groups {size} inputs")
    order = np.argsort(group, kind="stable")
    return None if np.array_equal(order, np.arange(inputs)) else order


class _Scaled(LazyTensor):
    """The scales of rows, on one axis."""

    def __init__(self, scale: LazyTensor, factor: float):
        super().__init__(scale.name, scale.shape[:1], np.dtype(np.float32), "F32", scale.nbytes)
        self._scale = scale
        self._factor = np.float32(factor)

    def rows(self, start: int, stop: int, columns: np.ndarray | None = None) -> np.ndarray:
        return _f32(self._scale, start, stop).reshape(-1) * self._factor


def _scaled(name: str, format: str, codes: LazyTensor, scale: LazyTensor | float, parts: Parts) -> BlockTensor:
    def read(start: int, stop: int) -> np.ndarray:
        return codes.rows(start, stop).view(np.uint8)[..., None]

    rows, inputs = codes.shape
    return BlockTensor(name, (rows, inputs), format, read, parts.nbytes, scale)


def _scalar(tensor: LazyTensor) -> np.float32:
    return np.float32(tensor.rows(0, 1).reshape(-1)[0])


# ---- the config ----


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
    block = document.take("weight_block_size", list[_Size] | None, None)
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
    bits = kind.take("num_bits", Literal[4, 8])
    kind.take("type", Literal["int", "float"])
    return CompressedTensors(bits)


_METHODS = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}
