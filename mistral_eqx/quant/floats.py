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


def fp8_format(size: int) -> BlockFormat:
    """Blocks of `size` numbers in float8 e4m3, with a scale in float32."""
    return BlockFormat(f"FP8/{size}", size, (4, size), lambda scale, q: single(scale) * float8(q))


FP8 = BlockFormat("FP8", 1, (1,), float8)
"""Numbers in float8 e4m3 without a scale, which belongs to a whole row or to the whole weight."""

NVFP4 = BlockFormat("NVFP4", 16, (1, 8), lambda scale, q: float8(scale) * looked_up(in_order(q, 4), FLOAT4))
"""Numbers of 4 bits with a scale in float8, and one in float32 that belongs to the whole weight."""
