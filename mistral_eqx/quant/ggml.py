"""The block formats of GGUF files: how the numbers of a block are stored.

The layouts are those of [ggml](https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h), where each struct has a
format's name. In all of them a number is `scale * code`, some add or subtract a minimum; formats whose name ends in K
have blocks of 256 numbers with scales of few bits for each 16 or 32 of them.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from .layout import (
    BlockFormat,
    Blocks,
    Numbers,
    as_float,
    half,
    in_order,
    looked_up,
    power_of_two,
    signed,
    single,
    split,
    unpacked,
)


def _q4_0(d: Blocks, q: Blocks) -> Numbers:
    return half(d) * (unpacked(q, 4, 16) - 8)


def _q4_1(d: Blocks, m: Blocks, q: Blocks) -> Numbers:
    return half(d) * unpacked(q, 4, 16) + half(m)


def _q5_0(d: Blocks, high: Blocks, q: Blocks) -> Numbers:
    return half(d) * (unpacked(q, 4, 16) + 16 * in_order(high, 1) - 16)


def _q5_1(d: Blocks, m: Blocks, high: Blocks, q: Blocks) -> Numbers:
    return half(d) * (unpacked(q, 4, 16) + 16 * in_order(high, 1)) + half(m)


def _q8_0(d: Blocks, q: Blocks) -> Numbers:
    return half(d) * signed(q)


def _q2_k(scales: Blocks, q: Blocks, d: Blocks, least: Blocks) -> Numbers:
    scale, minimum = half(d) * as_float(scales & 15), half(least) * as_float(scales >> 4)
    return _grouped(scale, unpacked(q, 2, 32)) - _grouped(minimum)


def _q3_k(mask: Blocks, q: Blocks, scales: Blocks, d: Blocks) -> Numbers:
    # 16 scales of 6 bits: the low 4 in the first 8 bytes, the high 2 in the last 4.
    scale = unpacked(scales[..., :8], 4, 8) + 16 * unpacked(scales[..., 8:], 2, 4) - 32
    # The third bit of a code is set where nothing is taken off.
    return _grouped(half(d) * scale, unpacked(q, 2, 32) - 4 * (1 - unpacked(mask, 1, 32)))


def _q4_k(d: Blocks, least: Blocks, scales: Blocks, q: Blocks) -> Numbers:
    scale, minimum = _scales_of_6_bits(scales)
    return _grouped(half(d) * scale, unpacked(q, 4, 32)) - _grouped(half(least) * minimum, size=32)


def _q5_k(d: Blocks, least: Blocks, scales: Blocks, high: Blocks, q: Blocks) -> Numbers:
    scale, minimum = _scales_of_6_bits(scales)
    codes = unpacked(q, 4, 32) + 16 * unpacked(high, 1, 32)
    return _grouped(half(d) * scale, codes) - _grouped(half(least) * minimum, size=32)


def _q6_k(low: Blocks, high: Blocks, scales: Blocks, d: Blocks) -> Numbers:
    return _grouped(half(d) * signed(scales), unpacked(low, 4, 64) + 16 * unpacked(high, 2, 32) - 32)


# The codes of IQ4: not evenly spaced, so that small numbers are closer to theirs.
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _iq4_nl(d: Blocks, q: Blocks) -> Numbers:
    return half(d) * looked_up(unpacked(q, 4, 16), IQ4)


def _iq4_xs(d: Blocks, high: Blocks, low: Blocks, q: Blocks) -> Numbers:
    # Here two scales lie side by side in a byte.
    fours = in_order(low, 4)
    twos = in_order(high, 2)
    return _grouped(half(d) * (fours + 16 * twos - 32), looked_up(unpacked(q, 4, 16), IQ4))


# Numbers of 4 bits, of which one is the sign, two the exponent and one the fraction (e2m1 of OCP's MX formats).
FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _mxfp4(e: Blocks, q: Blocks) -> Numbers:
    return power_of_two(e) * looked_up(unpacked(q, 4, 16), FLOAT4)


def _bf16(number: Blocks) -> Numbers:
    return as_float(lax.bitcast_convert_type(number, jnp.bfloat16))[..., None]


def _f16(number: Blocks) -> Numbers:
    return half(number)


def _f32(number: Blocks) -> Numbers:
    return single(number)


FORMATS = {
    kind.name: kind
    for kind in (
        BlockFormat("Q4_0", 32, (2, 16), _q4_0),
        BlockFormat("Q4_1", 32, (2, 2, 16), _q4_1),
        BlockFormat("Q5_0", 32, (2, 4, 16), _q5_0),
        BlockFormat("Q5_1", 32, (2, 2, 4, 16), _q5_1),
        BlockFormat("Q8_0", 32, (2, 32), _q8_0),
        BlockFormat("Q2_K", 256, (16, 64, 2, 2), _q2_k),
        BlockFormat("Q3_K", 256, (32, 64, 12, 2), _q3_k),
        BlockFormat("Q4_K", 256, (2, 2, 12, 128), _q4_k),
        BlockFormat("Q5_K", 256, (2, 2, 12, 32, 128), _q5_k),
        BlockFormat("Q6_K", 256, (128, 64, 16, 2), _q6_k),
        BlockFormat("IQ4_NL", 32, (2, 16), _iq4_nl),
        BlockFormat("IQ4_XS", 256, (2, 2, 4, 128), _iq4_xs),
        BlockFormat("MXFP4", 32, (1, 16), _mxfp4),
        BlockFormat("BF16", 1, (2,), _bf16),
        BlockFormat("F16", 1, (2,), _f16),
        BlockFormat("F32", 1, (4,), _f32),
    )
}


def _scales_of_6_bits(packed: Blocks) -> tuple[Numbers, Numbers]:
    """8 scales and 8 minima of 6 bits in 12 bytes."""
    scales, minima, both = split(packed, 4, 4, 4)
    scale = jnp.concatenate([scales & 63, both & 15 | (scales >> 2) & 48], axis=-1)
    minimum = jnp.concatenate([minima & 63, both >> 4 | (minima >> 2) & 48], axis=-1)
    return as_float(scale), as_float(minimum)


def _grouped(scale: Numbers, codes: Numbers | None = None, size: int = 16) -> Numbers:
    """Each scale for its group of codes; without codes, repeated `size` times."""
    if codes is None:
        return jnp.repeat(scale, size, axis=-1)
    groups = codes.reshape(*scale.shape, -1)
    return (scale[..., None] * groups).reshape(codes.shape)
