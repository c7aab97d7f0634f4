"""Numbers as int8 codes with a scale for each block, which travel where the strategy has the word `exchange=int8`."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Float32, Int8

from ..errors import InputError
from .strategy import Strategy


# A pass with fewer tokens in a row exchanges its sums as they are: there the number of exchanges costs more than their
# bytes, and decoding stays as precise as without codes.
FEWEST_TOKENS = 32
NO_GRADIENT = "Sums that travel as int8 codes have no gradient; leave 'exchange=int8' out of the strategy to train."
_LARGEST_BLOCK = 128
_LARGEST_CODE = 127
_SCALE_BYTES = 4


def are_coded(strategy: Strategy, seq: int) -> bool:
    """Whether a pass of `seq` tokens in a row exchanges the sums of its residual stream as codes."""
    return strategy.exchange is not None and seq >= FEWEST_TOKENS


def block_size(numbers: int) -> int:
    """How many of a token's numbers share a scale: the largest divisor that is at most 128."""
    return max(size for size in range(1, min(numbers, _LARGEST_BLOCK) + 1) if numbers % size == 0)


def code_bytes(blocks: int, numbers: int) -> int:
    """The bytes of so many blocks, of tokens with so many numbers."""
    return blocks * (block_size(numbers) + _SCALE_BYTES)


@jax.custom_jvp
def encode(x: Float[Array, "*rows blocks block"]) -> Int8[Array, "*rows bytes"]:
    """The codes of all blocks, and after them the bytes of their scales.

    A scale is 1/127 of the largest absolute value of its block, in float32. So a number changes by at most half of it.
    A block that has a number that is not finite becomes NaN.
    """
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / _LARGEST_CODE
    codes = jnp.round(wide / jnp.where(scales > 0, scales, 1)[..., None]).astype(jnp.int8)
    both = codes, lax.bitcast_convert_type(scales, jnp.int8)
    return jnp.concatenate([part.reshape(*x.shape[:-2], -1) for part in both], axis=-1)


@encode.defjvp
def _no_gradient(*_: object):
    # Rounding has the gradient 0, with which training would go on and learn nothing.
    raise InputError(NO_GRADIENT)


def decode(codes: Int8[Array, "*rows bytes"], block: int) -> Float32[Array, "*rows blocks {block}"]:
    """The numbers of all blocks, from their codes and scales."""
    blocks = codes.shape[-1] // (block + _SCALE_BYTES)
    numbers, scales = jnp.split(codes, [blocks * block], axis=-1)
    rows = *codes.shape[:-1], blocks
    scales = lax.bitcast_convert_type(scales.reshape(*rows, _SCALE_BYTES), jnp.float32)
    return numbers.reshape(*rows, block).astype(jnp.float32) * scales[..., None]
