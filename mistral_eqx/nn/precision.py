"""The precision of sums, and the bits of 16-bit floats."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt16


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The precision for sums over entries of `dtype`: float32 for a 16-bit one, otherwise `dtype` itself."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def to_bits(x: Float[Array, "*shape"]) -> UInt16[Array, "*shape"]:
    """The bits of a 16-bit float as an integer.

    XLA on CPU has no 16-bit float operations: even to read or replace one row, it converts the whole array to float32.
    It does not convert integers.
    """
    return lax.bitcast_convert_type(x, jnp.uint16)


def from_bits(x: Float[Array, "*shape"] | UInt16[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape"]:
    """The float of precision `dtype` whose bits `x` holds; `x` itself if it is a float."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x
