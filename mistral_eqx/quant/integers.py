"""Whole numbers of 2 to 8 bits: absmax and zero-point quantization.

A number is `scale * (code - zero)`. Codes have no sign: they begin at 0. Rounding to the nearest code with a scale from
the largest number is absmax quantization if the zero lies in the middle of all codes, and zero-point quantization if it
lies where the numbers' own zero does.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from .layout import BlockFormat, Blocks, Numbers, as_float, in_order, signed, single


def integer_format(bits: int, size: int) -> BlockFormat:
    """Blocks of `size` codes of so many bits, with a scale in float32 and a zero of one byte."""

    def numbers(scale: Blocks, zero: Blocks, q: Blocks) -> Numbers:
        return single(scale) * (in_order(q, bits) - as_float(zero))

    return BlockFormat(f"INT{bits}/{size}", size, (4, 1, size * bits // 8), numbers)


INT8 = BlockFormat("INT8", 1, (1,), signed)
"""Codes from -128 to 127 without a scale, which belongs to a whole row or column."""

# How many smaller scales are tried: the largest number, and down to half of it.
_TRIED = np.linspace(1.0, 0.5, 51)

# Rounding is the same on the host and in a program for a device.
AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)


def round_to_codes(
    numbers: AnyArray, bits: int, *, zero_point: bool = False, search: bool = False
) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Rounds numbers to the nearest codes, where the numbers of the last axis share a scale.

    **Arguments:**

    - `numbers`: shape `(..., size)`.
    - `bits`: of a code, 2 to 8.
    - `zero_point`: whether codes span the numbers from the least to the largest, and not from minus the largest size to
        the largest size.
    - `search`: whether smaller ranges are tried, and the one with the least squared error is taken: the largest numbers
        are then cut off, and the others rounded more finely.

    **Returns:** codes from 0, scales in float32 and zeros, the last two with an axis of 1.
    """
    numbers = numbers.astype(np.float32)

    def tried(shrunk: float) -> tuple[AnyArray, AnyArray, AnyArray]:
        scale, zero = grid(numbers, bits, zero_point=zero_point, shrunk=shrunk)
        return nearest(numbers, scale, zero, bits, zero_point=zero_point), scale, zero.astype(np.uint8)

    return least_error(numbers, tried, from_codes) if search else tried(1.0)


Found = TypeVar("Found", bound=tuple[Any, ...])


def least_error(
    numbers: AnyArray, tried: Callable[[float], Found], restored: Callable[..., AnyArray], axis: int | None = -1
) -> Found:
    """Tries smaller ranges, and takes for all numbers that share a scale the one with the least squared error.

    **Arguments:**

    - `numbers`: any shape.
    - `tried`: from the part of the range that codes span to codes and what belongs to them.
    - `restored`: the numbers of these.
    - `axis`: of the numbers that share a scale; `None` for all.
    """
    xp = _namespace(numbers)

    def measured(shrunk: float) -> tuple[Found, AnyArray]:
        found = tried(shrunk)
        return found, xp.sum((restored(*found) - numbers) ** 2, axis=axis, keepdims=True)

    best, least = measured(_TRIED[0])
    for shrunk in _TRIED[1:]:
        found, error = measured(shrunk)
        better = error < least
        best = tuple(xp.where(better, new, old) for new, old in zip(found, best, strict=True))
        least = xp.where(better, error, least)
    return best  # pyright: ignore[reportReturnType]


def grid(numbers: AnyArray, bits: int, *, zero_point: bool, shrunk: float = 1.0) -> tuple[AnyArray, AnyArray]:
    """The scale and the zero of numbers that share them, those of the last axis.

    **Arguments:**

    - `numbers`, `bits`, `zero_point`: as for `round_to_codes`.
    - `shrunk`: the part of the range that codes span.

    **Returns:** both in float32, with an axis of 1.
    """
    xp = _namespace(numbers)
    low, high = numbers.min(axis=-1, keepdims=True), numbers.max(axis=-1, keepdims=True)
    if not zero_point:
        high = xp.maximum(-low, high)
        low = -high
    low = (xp.minimum(low, 0) * shrunk).astype(np.float32)
    high = (xp.maximum(high, 0) * shrunk).astype(np.float32)
    middle, last = 2 ** (bits - 1), 2**bits - 1
    # Without a zero point the codes lie evenly on both sides, so that the least code is not used.
    steps = last if zero_point else 2 * (middle - 1)
    scale = ((high - low) / np.float32(steps)).astype(np.float32)
    # A block of zeros, or of numbers so small that their scale would be none.
    scale = xp.where(scale < np.finfo(np.float32).tiny, 1, scale)
    return scale, xp.clip(xp.rint(-low / scale), 0, last) if zero_point else xp.full_like(scale, middle)


def nearest(numbers: AnyArray, scale: AnyArray, zero: AnyArray, bits: int, *, zero_point: bool) -> AnyArray:
    """The nearest codes of numbers, given what `grid` returned."""
    xp, least = _namespace(numbers), 0 if zero_point else 1
    return xp.clip(xp.rint(numbers / scale) + zero, least, 2**bits - 1).astype(np.uint8)


def _namespace(array: Any) -> Any:
    """numpy for its arrays, and jax.numpy for those of JAX."""
    return array.__array_namespace__()


def from_codes(codes: AnyArray, scale: AnyArray, zero: AnyArray) -> AnyArray:
    """The numbers of codes."""
    return scale * (codes.astype(np.float32) - zero.astype(np.float32))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of the last axis one after the other, the lowest bit first, in bytes."""
    if bits == 8:
        return codes.astype(np.uint8)
    single_bits = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(single_bits.astype(np.uint8).reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack(packed: np.ndarray, bits: int, count: int | None = None) -> np.ndarray:
    """The codes in bytes of the last axis, as `pack` stores them; the first `count` if there is room for more."""
    single_bits = np.unpackbits(packed, axis=-1, count=None if count is None else count * bits, bitorder="little")
    single_bits = single_bits.reshape(*packed.shape[:-1], -1, bits)
    return (single_bits << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)


def integer_blocks(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """The bytes of blocks.

    **Arguments:**

    - `codes`: shape `(..., size)`.
    - `scale`, `zero`: shape `(..., 1)`.
    """
    as_bytes = np.ascontiguousarray(scale, np.float32).view(np.uint8)
    return np.concatenate([as_bytes, zero.astype(np.uint8), pack(codes, bits)], axis=-1)
