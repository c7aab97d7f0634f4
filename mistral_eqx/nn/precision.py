"""The precision in which sums are taken."""

import jax.numpy as jnp


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The precision for sums over entries of `dtype`: float32 for a 16-bit one, otherwise `dtype` itself."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype
