"""Folders that bitsandbytes quantized: NF4, and whole numbers of 8 bits."""

import functools
import math
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge

from ...checks import checked
from ...documents import parse_json
from ...errors import InputError
from ...quant import DOUBLE_SIZE, DYNAMIC_CODES, NF4_CODES, double_nf4_rows, nf4_blocks
from ..block_tensor import BlockTensor
from ..reader import LazyTensor
from .parts import Parts, Quantization, RowScales, as_float32, everything, scaled_tensor


Size = Annotated[int, Ge(1)]
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


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
        table = everything(parts.take("weight.quant_map", "float")).astype(np.float32).reshape(-1)
        parts.expect(np.array_equal(table, NF4_CODES), "quant_map is not that of nf4")
        largest = self._largest(parts, absmax, state)

        def read(start: int, stop: int) -> np.ndarray:
            raw = codes.rows(start * inputs // 2, stop * inputs // 2).reshape(stop - start, count, size // 2)
            pairs = np.stack([raw >> 4, raw & 15], axis=-1).reshape(stop - start, count, size)
            return nf4_blocks(pairs, largest(start * count, stop * count).reshape(stop - start, count, 1))

        plain = BlockTensor(name, (rows, inputs), f"NF4/{size}", read, parts.nbytes)
        if not state["nested"] or (size, state["nested_blocksize"]) != (DOUBLE_SIZE, 256):
            return plain
        factors, numbers = self._nested(parts)
        # They differ by the rounding of the machine that quantized.
        if not np.allclose(numbers, DYNAMIC_CODES, rtol=3e-7, atol=0):
            return plain

        def read_rows(start: int, stop: int) -> np.ndarray:
            raw = codes.rows(start * inputs // 2, stop * inputs // 2).reshape(stop - start, -1)
            scales = absmax.rows(start * count, stop * count).reshape(stop - start, count)
            offset = np.float32(state["nested_offset"])
            return double_nf4_rows(raw, scales, start * count, factors, offset)

        return BlockTensor(name, (rows, inputs), f"NF4D/{inputs}", read_rows, parts.nbytes, smaller=plain)

    def _nested(self, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
        """The factors of scales, and the numbers that these stand for."""
        factors, table = (everything(parts.take(end, "float32", 1)) for end in _NESTED)
        parts.expect(len(table) == 256, "nested_quant_map must have 256 entries")
        return factors, table

    def _state(self, parts: Parts) -> dict[str, Any]:
        raw = everything(parts.take("weight.quant_state.bitsandbytes__nf4", "uint8")).tobytes()
        what = f"The tensor {f'{parts.stem}.weight.quant_state.bitsandbytes__nf4'!r}"
        try:
            state = parse_json(raw.decode(), "its content")
        except (InputError, UnicodeDecodeError) as error:
            raise InputError(f"{what} is not JSON; fetch the checkpoint again.", key=parts.stem) from error

        def of(key: str, kind: Any) -> Any:
            found = state.get(key) if isinstance(state, dict) else None
            return checked(found, kind, f"{key!r} in {what}", key=parts.stem, remedy="fetch the checkpoint again")

        nested = isinstance(state, dict) and state.get("nested_blocksize") is not None
        shape = of("shape", list[Size])
        parts.expect(len(shape) == 2, f"the weight has shape {tuple(shape)}")
        return {
            "shape": shape,
            "blocksize": of("blocksize", Size),
            "nested": nested,
            "nested_blocksize": of("nested_blocksize", Size) if nested else 0,
            "nested_offset": of("nested_offset", float) if nested else 0.0,
        }

    def _largest(self, parts: Parts, absmax: LazyTensor, state: dict[str, Any]) -> Any:
        if not state["nested"]:
            return functools.partial(as_float32, absmax)
        scales, table = self._nested(parts)
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
        return scaled_tensor(name, "INT8", codes, RowScales(scale, 1 / 127), parts)
