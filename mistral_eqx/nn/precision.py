"""The precision of sums, and the bits of short floats."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num, UInt


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The precision for sums over entries of `dtype`: float32 for a 16-bit one, otherwise `dtype` itself."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def to_bits(x: Float[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """The bits of a float of 8 or 16 bits as an integer.

    XLA on CPU has no operations on such floats: even to read or replace one row, it converts the whole array to
    float32. It does not convert integers.
    """
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


def from_bits(x: Num[Array, "*shape"], dtype: jnp.dtype) -> Num[Array, "*shape"]:
    """The numbers of precision `dtype` whose bits `x` holds; `x` itself if it holds such numbers."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)
