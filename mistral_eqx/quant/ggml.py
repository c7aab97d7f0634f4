"""The block formats of GGUF files: how the numbers of a block are stored.

The layouts are those of [ggml](https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h), where each struct has a
format's name. In all of them a number is `scale * code`, some add or subtract a minimum; formats whose name ends in K
have blocks of 256 numbers with scales of few bits for each 16 or 32 of them.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8


Blocks = UInt8[Array, "..."]
Numbers = Float[Array, "..."]


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """A block format.

    **Attributes:**

    - `name`: its name in GGUF.
    - `size`: how many numbers a block has.
    - `fields`: how many bytes each field of a block has.
    - `numbers`: from the fields of blocks to their numbers.
    """

    name: str
    size: int
    fields: tuple[int, ...]
    numbers: Callable[..., Numbers]

    @property
    def nbytes(self) -> int:
        """How many bytes a block has."""
        return sum(self.fields)

    def dequantize(self, blocks: UInt8[Array, "*axes nbytes"]) -> Float[Array, "*axes size"]:
        """The numbers of blocks, in float32."""
        return self.numbers(*_split(blocks, *self.fields))


def _q4_0(d: Blocks, q: Blocks) -> Numbers:
    return _half(d) * (_codes(q, 4, 16) - 8)


def _q4_1(d: Blocks, m: Blocks, q: Blocks) -> Numbers:
    return _half(d) * _codes(q, 4, 16) + _half(m)


def _q5_0(d: Blocks, high: Blocks, q: Blocks) -> Numbers:
    return _half(d) * (_codes(q, 4, 16) + 16 * _bits(high) - 16)


def _q5_1(d: Blocks, m: Blocks, high: Blocks, q: Blocks) -> Numbers:
    return _half(d) * (_codes(q, 4, 16) + 16 * _bits(high)) + _half(m)


def _q8_0(d: Blocks, q: Blocks) -> Numbers:
    return _half(d) * _signed(q)


def _q2_k(scales: Blocks, q: Blocks, d: Blocks, least: Blocks) -> Numbers:
    scale, minimum = _half(d) * _float(scales & 15), _half(least) * _float(scales >> 4)
    return _grouped(scale, _codes(q, 2, 32)) - _grouped(minimum)


def _q3_k(mask: Blocks, q: Blocks, scales: Blocks, d: Blocks) -> Numbers:
    # 16 scales of 6 bits: the low 4 in the first 8 bytes, the high 2 in the last 4.
    scale = _codes(scales[..., :8], 4, 8) + 16 * _codes(scales[..., 8:], 2, 4) - 32
    # The third bit of a code is set where nothing is taken off.
    return _grouped(_half(d) * scale, _codes(q, 2, 32) - 4 * (1 - _codes(mask, 1, 32)))


def _q4_k(d: Blocks, least: Blocks, scales: Blocks, q: Blocks) -> Numbers:
    scale, minimum = _scales_of_6_bits(scales)
    return _grouped(_half(d) * scale, _codes(q, 4, 32)) - _grouped(_half(least) * minimum, size=32)


def _q5_k(d: Blocks, least: Blocks, scales: Blocks, high: Blocks, q: Blocks) -> Numbers:
    scale, minimum = _scales_of_6_bits(scales)
    codes = _codes(q, 4, 32) + 16 * _codes(high, 1, 32)
    return _grouped(_half(d) * scale, codes) - _grouped(_half(least) * minimum, size=32)


def _q6_k(low: Blocks, high: Blocks, scales: Blocks, d: Blocks) -> Numbers:
    return _grouped(_half(d) * _signed(scales), _codes(low, 4, 64) + 16 * _codes(high, 2, 32) - 32)


# The codes of IQ4: not evenly spaced, so that small numbers are closer to theirs.
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _iq4_nl(d: Blocks, q: Blocks) -> Numbers:
    return _half(d) * _looked_up(q)


def _iq4_xs(d: Blocks, high: Blocks, low: Blocks, q: Blocks) -> Numbers:
    # Here two scales lie side by side in a byte.
    fours = _pairs(low, 4)
    twos = _pairs(high, 2)
    return _grouped(_half(d) * (fours + 16 * twos - 32), _looked_up(q))


def _bf16(number: Blocks) -> Numbers:
    return _float(lax.bitcast_convert_type(number, jnp.bfloat16))[..., None]


def _f16(number: Blocks) -> Numbers:
    return _half(number)


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
        BlockFormat("BF16", 1, (2,), _bf16),
        BlockFormat("F16", 1, (2,), _f16),
    )
}


def _split(blocks: Blocks, *sizes: int) -> list[Blocks]:
    """The fields of blocks, by their numbers of bytes."""
    return jnp.split(blocks, np.cumsum(sizes)[:-1].tolist(), axis=-1)


def _float(x: Array) -> Numbers:
    return x.astype(jnp.float32)


def _half(pair: Blocks) -> Numbers:
    """A number in float16, on an axis of 1."""
    return _float(lax.bitcast_convert_type(pair, jnp.float16))[..., None]


def _signed(q: Blocks) -> Numbers:
    return _float(lax.bitcast_convert_type(q, jnp.int8))


def _codes(q: Blocks, bits: int, width: int) -> Numbers:
    """Codes of so many bits: of each `width` bytes first the lowest bits of all, then the next, and so on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(*[1] * q.ndim, -1, 1)
    parts = (q.reshape(*q.shape[:-1], -1, 1, width) >> shifts) & np.uint8(2**bits - 1)
    return _float(parts).reshape(*q.shape[:-1], -1)


def _pairs(q: Blocks, bits: int) -> Numbers:
    """Codes of so many bits, those of a byte side by side."""
    return _codes(q, bits, 1)


def _bits(q: Blocks) -> Numbers:
    return _pairs(q, 1)


def _looked_up(q: Blocks) -> Numbers:
    return jnp.asarray(_IQ4)[_codes(q, 4, 16).astype(jnp.int32)]


def _scales_of_6_bits(packed: Blocks) -> tuple[Numbers, Numbers]:
    """8 scales and 8 minima of 6 bits in 12 bytes."""
    scales, minima, both = _split(packed, 4, 4, 4)
    scale = jnp.concatenate([scales & 63, both & 15 | (scales >> 2) & 48], axis=-1)
    minimum = jnp.concatenate([minima & 63, both >> 4 | (minima >> 2) & 48], axis=-1)
    return _float(scale), _float(minimum)


def _grouped(scale: Numbers, codes: Numbers | None = None, size: int = 16) -> Numbers:
    """Each scale for its group of codes; without codes, repeated `size` times."""
    if codes is None:
        return jnp.repeat(scale, size, axis=-1)
    groups = codes.reshape(*scale.shape, -1)
    return (scale[..., None] * groups).reshape(codes.shape)
