"""What a block format is, and how packed codes come out of its bytes."""

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

    - `name`: its name, in GGUF if GGUF has it.
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
        return self.numbers(*split(blocks, *self.fields))


def split(blocks: Blocks, *sizes: int) -> list[Blocks]:
    """The fields of blocks, by their numbers of bytes."""
    return jnp.split(blocks, np.cumsum(sizes)[:-1].tolist(), axis=-1)


def as_float(x: Array) -> Numbers:
    """Codes as numbers."""
    return x.astype(jnp.float32)


def half(pair: Blocks) -> Numbers:
    """A number in float16, on an axis of 1."""
    return as_float(lax.bitcast_convert_type(pair, jnp.float16))[..., None]


def single(four: Blocks) -> Numbers:
    """A number in float32, on an axis of 1."""
    return lax.bitcast_convert_type(four, jnp.float32)[..., None]


def float8(q: Blocks) -> Numbers:
    """Numbers in float8 e4m3."""
    return as_float(lax.bitcast_convert_type(q, jnp.float8_e4m3fn))


def power_of_two(exponent: Blocks) -> Numbers:
    """Powers from 2^-127 to 2^128, of which only the exponent is stored (e8m0 of OCP's MX formats)."""
    # The least one is too small for a float with all its bits.
    return lax.bitcast_convert_type(
        jnp.where(exponent == 0, np.uint32(0x00400000), exponent.astype(jnp.uint32) << 23), jnp.float32
    )


def signed(q: Blocks) -> Numbers:
    """Codes from -128 to 127."""
    return as_float(lax.bitcast_convert_type(q, jnp.int8))


def unpacked(q: Blocks, bits: int, width: int) -> Numbers:
    """Codes of 1, 2, 4 or 8 bits: of each `width` bytes first the lowest bits of all, then the next, and so on."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(*[1] * q.ndim, -1, 1)
    parts = (q.reshape(*q.shape[:-1], -1, 1, width) >> shifts) & np.uint8(2**bits - 1)
    return as_float(parts).reshape(*q.shape[:-1], -1)


def in_order(q: Blocks, bits: int) -> Numbers:
    """Codes of 1 to 8 bits, one after the other, the lowest bit first."""
    if 8 % bits == 0:
        return unpacked(q, bits, 1)
    single_bits = unpacked(q, 1, 1)
    return single_bits.reshape(*q.shape[:-1], -1, bits) @ jnp.asarray(2.0 ** np.arange(bits), jnp.float32)


def looked_up(q: Numbers, table: np.ndarray) -> Numbers:
    """The entries of a table at codes."""
    return jnp.asarray(table)[q.astype(jnp.int32)]
