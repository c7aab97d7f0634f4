"""Numbers of 4 and 8 bits that are not evenly spaced: NF4, NVFP4 and FP8."""

import jax.numpy as jnp
import numpy as np

from .ggml import FLOAT4
from .layout import BlockFormat, Blocks, Numbers, as_float, float8, in_order, looked_up, single


# The quantiles of a normal distribution, scaled to -1 ... 1 ([QLoRA](https://arxiv.org/abs/2305.14314), appendix E).
NF4_CODES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
# Between two neighbours, the numbers above the middle belong to the upper one.
_BETWEEN = (NF4_CODES[:-1] + NF4_CODES[1:]) / 2

# In double quantization so many numbers share a scale of 8 bits, and so many of these scales a factor.
DOUBLE_SIZE, _SHARE = 64, 256


def _dynamic_codes() -> np.ndarray:
    """Numbers of 8 bits with more exponents for small ones and more fraction for large ones, the least first
    ([Dettmers, 2016](https://arxiv.org/abs/1511.04561)).
    """
    numbers: list[np.ndarray] = [np.array([0.0, 1.0])]
    for exponent in range(7):
        count = 2**exponent
        means = 10.0 ** (exponent - 6) * (0.1 + 0.9 * (np.arange(count) + 0.5) / count)
        numbers += [means, -means]
    return np.sort(np.concatenate(numbers)).astype(np.float32)


DYNAMIC_CODES = _dynamic_codes()
_BETWEEN_DYNAMIC = (DYNAMIC_CODES[:-1].astype(np.float64) + DYNAMIC_CODES[1:]) / 2
_HALF_OF_TABLE = (2**16 - 1) / 2

LARGEST_FP8 = 448.0


def nf4_format(size: int) -> BlockFormat:
    """Blocks of `size` codes of NF4, with their largest size in float32.

    Of the two codes of a byte the first one has the high bits, as in bitsandbytes.
    """

    def numbers(largest: Blocks, q: Blocks) -> Numbers:
        pairs = jnp.stack([q >> 4, q & 15], axis=-1).reshape(*q.shape[:-1], -1)
        return looked_up(as_float(pairs), NF4_CODES) * single(largest)

    return BlockFormat(f"NF4/{size}", size, (4, size // 2), numbers)


def nf4_codes(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest codes of NF4, and the largest size of the last axis, in float32.

    Equal to bitsandbytes' but where a number lies within rounding of the middle between two codes.
    """
    numbers = numbers.astype(np.float32)
    largest = np.abs(numbers).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(largest > 0, np.float32(1) / largest, np.float32(0))
    codes = np.searchsorted(_BETWEEN, (numbers * inverse).astype(np.float32).reshape(-1), side="left")
    return codes.reshape(numbers.shape).astype(np.uint8), largest


def nf4_blocks(codes: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """The bytes of blocks: codes of shape `(..., size)`, largest sizes of shape `(..., 1)`."""
    as_bytes = np.ascontiguousarray(largest, np.float32).view(np.uint8)
    return np.concatenate([as_bytes, codes[..., 0::2] << 4 | codes[..., 1::2]], axis=-1)


def double_nf4_format(size: int) -> BlockFormat:
    """Rows of `size` codes of NF4 in groups of 64, whose largest sizes are quantized too, as bitsandbytes does.

    The scales of all rows stand one after the other, and each 256 of them share a factor. A group's largest size is
    `DYNAMIC_CODES[scale] * factor + offset`. Before the codes, a row has the offset, the factors that its scales can
    have, the index of its first scale among those with the same factor, and its scales.
    """
    count = size // DOUBLE_SIZE
    # What the kernels read at once has 4 bytes.
    fields = (4, 4 * _factors(count), (count + 4) // 4 * 4, size // 2)

    def numbers(*fields: Blocks) -> Numbers:
        *scales, q = fields
        pairs = jnp.stack([q >> 4, q & 15], axis=-1).reshape(*q.shape[:-1], count, DOUBLE_SIZE)
        return (looked_up(as_float(pairs), NF4_CODES) * double_nf4_largest(count, *scales)).reshape(*q.shape[:-1], -1)

    return BlockFormat(f"NF4D/{size}", size, fields, numbers)


def double_nf4_largest(count: int, offset: Blocks, factors: Blocks, scales: Blocks) -> Numbers:
    """The largest size of each of a row's `count` groups, on an axis before one of 1."""
    place = scales[..., :1].astype(jnp.int32) + np.arange(count, dtype=np.int32).reshape(*[1] * (scales.ndim - 1), -1)
    factor = single(factors.reshape(*factors.shape[:-1], -1, 4))[..., 0]
    numbers = looked_up(as_float(scales[..., 1 : 1 + count]), DYNAMIC_CODES)
    return (numbers * jnp.take_along_axis(factor, place // _SHARE, axis=-1) + single(offset))[..., None]


def _factors(count: int) -> int:
    """How many factors `count` scales can have."""
    return (count + _SHARE - 2) // _SHARE + 1


def double_nf4_scales(largest: np.ndarray, offset: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """The scales and factors of largest sizes less an offset; these have the shape `(groups,)`."""
    centred = (largest - offset).astype(np.float32)
    padded = np.pad(centred, (0, -len(centred) % _SHARE)).reshape(-1, _SHARE)
    factors = np.abs(padded).max(axis=1)
    with np.errstate(invalid="ignore"):
        shares = np.nan_to_num(padded / factors[:, None]).reshape(-1)[: len(centred)]
    # bitsandbytes looks shares up in a table that has 2^16 of them.
    steps = np.rint((shares.astype(np.float64) + 1) * _HALF_OF_TABLE) / _HALF_OF_TABLE - 1
    return np.searchsorted(_BETWEEN_DYNAMIC, steps).astype(np.uint8), factors


def double_nf4_rows(
    codes: np.ndarray, scales: np.ndarray, first: int, factors: np.ndarray, offset: np.float32
) -> np.ndarray:
    """The bytes of rows in double quantization, shape `(rows, bytes)`.

    **Arguments:**

    - `codes`: two to a byte, shape `(rows, size / 2)`.
    - `scales`: shape `(rows, groups)`.
    - `first`: the index of the first of these scales among all of the weight.
    - `factors`: those of all scales of the weight.
    - `offset`: that of the weight.
    """
    rows, count = scales.shape
    at = first + count * np.arange(rows)
    own = at[:, None] // _SHARE + np.arange(_factors(count))
    # Of the last one there may be fewer than there can be.
    own = factors[np.minimum(own, len(factors) - 1)]
    singles = np.concatenate([np.full((rows, 1), offset), own], axis=1, dtype=np.float32)
    room = np.zeros((rows, -(1 + count) % 4), np.uint8)
    first_of_row = (at % _SHARE).astype(np.uint8)[:, None]
    return np.concatenate([singles.view(np.uint8), first_of_row, scales, room, codes], axis=1)


def fp8_format(size: int) -> BlockFormat:
    """Blocks of `size` numbers in float8 e4m3, with a scale in float32."""
    return BlockFormat(f"FP8/{size}", size, (4, size), lambda scale, q: single(scale) * float8(q))


FP8 = BlockFormat("FP8", 1, (1,), float8)
"""Numbers in float8 e4m3 without a scale, which belongs to a whole row or to the whole weight."""

NVFP4 = BlockFormat("NVFP4", 16, (1, 8), lambda scale, q: float8(scale) * looked_up(in_order(q, 4), FLOAT4))
"""Numbers of 4 bits with a scale in float8, and one in float32 that belongs to the whole weight."""
