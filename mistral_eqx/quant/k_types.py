"""Quantizes to the types of GGUF whose scales are searched: K types and IQ4.

Each group of 16 or 32 numbers tries several scales and keeps the one with the least weighted error. The scales of a
block's groups are then rounded to few bits, and the numbers to the codes that are nearest with the rounded scales.
Weights, tried scales and the order of all float32 operations are those of
[ggml](https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c) without an importance matrix, so that the codes
are the same bits.

Arrays of numbers have a group in each column. A sum over the first axis then adds the numbers of a group one after the
other, as a loop does.
"""

from collections.abc import Callable, Iterable

import numpy as np

from .ggml import IQ4


# A group whose numbers are all smaller is zero.
_TINY = np.float32(1e-15)


def k_blocks(kind: str, numbers: np.ndarray) -> np.ndarray:
    """The bytes of blocks.

    **Arguments:**

    - `kind`: one of `K_TYPES`.
    - `numbers`: float32, shape `(blocks, size)`.
    """
    # A group of zeros divides by zero; its result is then not taken.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.concatenate(_FIELDS[kind](numbers), axis=1)


Fields = tuple[np.ndarray, ...]


def _q2_k(numbers: np.ndarray) -> Fields:
    x = _groups(numbers, 16)
    scale, least, codes = _with_minimum(x, np.abs(x), last=3, first=-0.5, steps=15, size=np.abs)
    (scales, d), (minima, dmin) = _rounded(scale.reshape(-1, 16), 15), _rounded(least.reshape(-1, 16), 15)
    codes = _nearest(x, d * scales, codes, 0, 3, dmin * minima)
    return _bytes(scales) | _bytes(minima) << 4, _packed(codes, 2, 32), _half(d), _half(dmin)


def _q3_k(numbers: np.ndarray) -> Fields:
    x = _groups(numbers, 16)
    scale, codes = _without_minimum_by_number(x, 4)
    scale = scale.reshape(-1, 16)
    largest = _largest(scale.T)[:, None]
    scales = np.where(largest != 0, _clipped(scale * (-32 / largest), -32, 31), -32)
    d = _as_half(np.where(largest != 0, 1 / (-32 / largest), 0))
    codes = _nearest(x, d * scales, codes, -4, 3)
    codes, scales = codes + np.uint8(4), _bytes(scales + 32)
    packed_scales = np.concatenate([_packed(scales & 15, 4, 8), _packed(scales >> 4, 2, 4)], axis=1)
    return _packed(codes >> 2, 1, 32), _packed(codes & 3, 2, 32), packed_scales, _half(d)


def _q4_k(numbers: np.ndarray) -> Fields:
    codes, *scales = _with_minima_of_6_bits(numbers, last=15, first=-1.0, steps=20)
    return *scales, _packed(codes, 4, 32)


def _q5_k(numbers: np.ndarray) -> Fields:
    codes, *scales = _with_minima_of_6_bits(numbers, last=31, first=-0.5, steps=15)
    return *scales, _packed(codes >> 4, 1, 32), _packed(codes & 15, 4, 32)


def _q6_k(numbers: np.ndarray) -> Fields:
    x = _groups(numbers, 16)
    squares = x * x
    cubes = squares * x
    largest = _largest(x)

    def products(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = _clipped(x * inverse, -32, 31)
        return (cubes * codes).sum(axis=0), (squares * codes * codes).sum(axis=0)

    tried = (-(32 + np.float32(0.1) * np.float32(step)) / largest for step in (0, *range(-9, 0), *range(1, 10)))
    scale, inverse = _least_squares(tried, products)
    zero = np.abs(largest) < _TINY
    scale = np.where(zero, 0, scale).reshape(-1, 16)
    codes = np.where(zero, -32, _clipped(x * inverse, -32, 31))
    largest = _largest(scale.T)[:, None]
    d = _as_half(1 / (-128 / largest))
    scales = np.minimum(np.rint(-128 / largest * scale), 127)
    codes = _nearest(x, d * scales, codes, -32, 31) + np.uint8(32)
    fields = _packed(codes & 15, 4, 64), _packed(codes >> 4, 2, 32), scales.astype(np.int8).view(np.uint8), _half(d)
    empty = np.abs(largest) < _TINY
    return tuple(np.where(empty, np.uint8(0), field) for field in fields)


def _iq4_nl(numbers: np.ndarray) -> Fields:
    x = _groups(numbers, 32)
    scale = _iq4_scale(x)
    codes = _iq4_codes(x, np.where(scale != 0, 1 / scale, 0)).T
    return _half(_as_half(scale[:, None])), _packed(codes, 4, 16)


def _iq4_xs(numbers: np.ndarray) -> Fields:
    x = _groups(numbers, 32)
    scale = _iq4_scale(x).reshape(-1, 8)
    d = _largest(scale.T)[:, None] / np.float32(-32)
    scales = _clipped(np.where(d != 0, 1 / d, 0) * scale, -32, 31)
    each = (d * scales).reshape(-1)
    codes = _iq4_codes(x, np.where(each != 0, 1 / each, 0)).T.reshape(len(numbers), -1)
    scales = _bytes(scales + 32)
    return _half(_as_half(d)), _packed(scales >> 4, 2, 1), _packed(scales & 15, 4, 1), _packed(codes, 4, 16)


_FIELDS: dict[str, Callable[[np.ndarray], Fields]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}

K_TYPES = tuple(_FIELDS)


def _with_minima_of_6_bits(numbers: np.ndarray, last: int, first: float, steps: int) -> Fields:
    """The codes, and the fields of the scales."""
    x = _groups(numbers, 32)
    sizes = np.abs(x)
    weights = np.sqrt((x * x).sum(axis=0) / 32) + sizes
    scale, least, codes = _with_minimum(x, weights, last, first, steps, np.square)
    (scales, d), (minima, dmin) = _rounded(scale.reshape(-1, 8), 63), _rounded(least.reshape(-1, 8), 63)
    codes = _nearest(x, d * scales, codes, 0, last, dmin * minima)
    scales, minima = _bytes(scales), _bytes(minima)
    # The high 2 bits of the last four lie above the 6 bits of the first four.
    packed = (one[:, :4] | one[:, 4:] >> 4 << 6 for one in (scales, minima))
    return codes, _half(d), _half(dmin), *packed, scales[:, 4:] & 15 | minima[:, 4:] << 4


def _with_minimum(
    x: np.ndarray,
    weights: np.ndarray,
    last: int,
    first: float,
    steps: int,
    size: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Searches `scale * code - least` for each group, with codes from 0 to `last`.

    **Arguments:**

    - `x`, `weights`: the numbers and the weights of their errors.
    - `first`, `steps`: the first tried range of codes is `last + first`, and each of as many steps adds 0.1.
    - `size`: the size of an error.

    **Returns:** scales, minima and codes.
    """
    low, high = np.minimum(x.min(axis=0), 0), x.max(axis=0)
    weight, weighted = weights.sum(axis=0), (weights * x).sum(axis=0)

    def error(scale: np.ndarray, low: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return (weights * size(scale * codes + low - x)).sum(axis=0)

    inverse = last / (high - low)
    scale, start = 1 / inverse, low
    least = error(scale, low, _clipped(inverse * (x - low), 0, last))
    for step in range(steps + 1):
        tried = (np.float32(first) + np.float32(0.1) * np.float32(step) + last) / (high - low)
        codes = _clipped(tried * (x - low), 0, last)
        of_codes = weights * codes
        codes_1, codes_2, both = of_codes.sum(axis=0), (of_codes * codes).sum(axis=0), (of_codes * x).sum(axis=0)
        determinant = weight * codes_2 - codes_1 * codes_1
        new_scale = (weight * both - weighted * codes_1) / determinant
        new_low = (codes_2 * weighted - codes_1 * both) / determinant
        new_scale = np.where(new_low > 0, both / codes_2, new_scale)
        new_low = np.minimum(new_low, 0)
        found = error(new_scale, new_low, codes)
        better = (determinant > 0) & (found < least)
        # The next range begins at the minimum that was found.
        inverse, start = np.where(better, tried, inverse), np.where(better, low, start)
        scale, low, least = (
            np.where(better, new, old) for new, old in ((new_scale, scale), (new_low, low), (found, least))
        )
    return scale, -low, _clipped(inverse * (x - start), 0, last)


def _without_minimum_by_number(x: np.ndarray, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Searches `scale * code` for each group, with codes from `-last` to `last - 1`, by changing one code at a time."""
    largest = _largest(x)
    squares = x * x
    cubes = squares * x
    codes = _clipped(x * (-last / largest), -last, last - 1)
    product, norm = (cubes * codes).sum(axis=0), (squares * codes * codes).sum(axis=0)
    for _ in range(5):
        for number, square, cube, code in zip(x, squares, cubes, codes, strict=True):
            rest, rest_norm = product - cube * code, norm - square * code * code
            new = _clipped(number * rest_norm / rest, -last, last - 1)
            new_product, new_norm = rest + cube * new, rest_norm + square * new * new
            better = (rest > 0) & (new != code) & (new_norm > 0)
            better &= new_product * new_product * norm > product * product * new_norm
            for old, found in ((code, new), (product, new_product), (norm, new_norm)):
                np.copyto(old, found, where=better)
    zero = np.abs(largest) < _TINY
    return np.where(zero | (norm <= 0), 0, product / norm), np.where(zero, -last, codes)


def _least_squares(
    tried: Iterable[np.ndarray], products: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """The scales with the least squared errors, and the inverse scales that their codes are from.

    **Arguments:**

    - `tried`: inverse scales of all groups.
    - `products`: from inverse scales to the weighted products of codes and numbers, and of codes and codes.
    """
    scale, best, kept = np.float32(0), np.float32(-1), np.float32(0)
    for inverse in tried:
        product, norm = products(inverse)
        better = (norm > 0) & (product * product > best * norm)
        scale = np.where(better, product / norm, scale)
        best = np.where(better, scale * product, best)
        kept = np.where(better, inverse, kept)
    return np.asarray(scale), np.asarray(kept)


# The nearest code of IQ4 for each half from -128: all middles between two codes are multiples of a half.
_NEAREST_IQ4 = np.searchsorted((IQ4[1:] + IQ4[:-1]) / 2, np.arange(-128, 128, 0.5), side="right").astype(np.uint8)


def _iq4_codes(x: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    halves = np.fmin(np.fmax(np.floor(x * (2 * inverse)), -256), 255)
    return _NEAREST_IQ4.take((halves + 256).astype(np.intp))


def _iq4_scale(x: np.ndarray) -> np.ndarray:
    squares = x * x
    largest = _largest(x)

    def products(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers = IQ4.take(_iq4_codes(x, inverse))
        weighted = squares * numbers
        return (weighted * x).sum(axis=0), (weighted * numbers).sum(axis=0)

    tried = (1 / (largest / 127), *((step - 127) / largest for step in range(-7, 8)))
    scale, _ = _least_squares(tried, products)
    return np.where(np.abs(largest) < _TINY, 0, scale)


def _rounded(scale: np.ndarray, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The scales of a block's groups as codes from 0 to `last`, and the scale of these."""
    largest = np.fmax(scale.max(axis=1, keepdims=True), 0)
    codes = np.where(largest > 0, _clipped(last / largest * scale, 0, last), 0)
    return codes, _as_half(largest / last)


def _nearest(
    x: np.ndarray, scale: np.ndarray, searched: np.ndarray, least: int, last: int, minimum: np.ndarray | None = None
) -> np.ndarray:
    """The codes of whole blocks, in rows: the nearest ones, or where the scale is 0, those of the search."""
    scale = scale.reshape(-1)
    if minimum is not None:
        x = x + minimum.reshape(-1)
    codes = np.where(scale == 0, searched, _clipped(x / scale, least, last))
    # A group of equal numbers has codes of NaN, which `fmax` leaves out.
    return np.fmax(codes, least).astype(np.int8).view(np.uint8).T.reshape(-1, 256)


def _clipped(numbers: np.ndarray, least: int, last: int) -> np.ndarray:
    """The nearest whole numbers in a range, in the array that is given."""
    return np.clip(np.rint(numbers, out=numbers), least, last, out=numbers)


def _largest(x: np.ndarray) -> np.ndarray:
    """The number of each column with the largest size, the first of them if there are several."""
    largest = np.zeros_like(x[0])
    for row in x:
        np.copyto(largest, row, where=np.abs(row) > np.abs(largest))
    return largest


def _groups(numbers: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(numbers.reshape(-1, size).T)


def _as_half(d: np.ndarray) -> np.ndarray:
    """Scales as they are stored: rounded to float16."""
    return d.astype(np.float16).astype(np.float32)


def _half(d: np.ndarray) -> np.ndarray:
    return d.astype(np.float16).view(np.uint8)


def _bytes(codes: np.ndarray) -> np.ndarray:
    return codes.astype(np.uint8)


def _packed(codes: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Codes of 1, 2 or 4 bits in bytes, as `unpacked` of `layout.py` reads them."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    parts = codes.reshape(len(codes), -1, 8 // bits, width) << shifts
    return np.bitwise_or.reduce(parts, axis=2).reshape(len(codes), -1)
