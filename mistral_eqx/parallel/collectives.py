"""The only file that names a collective operation."""

from jax import Array, lax

from .strategy import Strategy


def psum(x: Array, dims: str, strategy: Strategy) -> Array:
    """Adds up partial sums over the devices among which `strategy` splits a contracted dimension.

    **Arguments:**

    - `x`: this device's partial sum, any shape.
    - `dims`: the dimensions that were summed over, such as `"kv_heads q_per_kv head_dim"`.
    - `strategy`: tells which mesh axes split them.

    **Returns:** the sum, on every device; `x` itself if nothing is split.
    """
    axes = strategy.split_over(dims)
    return lax.psum(x, axes) if axes else x
