"""Root-mean-square normalisation."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..parallel import SINGLE, Strategy, psum, shard_index
from .precision import at_least_float32


class RMSNorm(eqx.Module):
    """Scales vectors to a root mean square of one, then each entry by a weight
    ([Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467)).

    The mean is computed in float32 or wider, whatever the precision of the activations.

    **Attributes:**

    - `weight`: one factor for each entry, shape `(embed,)`.
    - `eps`: added to the mean of squares.
    - `strategy`: which dimensions are split over which mesh axes.
    """

    weight: Float[Array, " embed"]
    eps: float = eqx.field(static=True)
    strategy: Strategy = SINGLE

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        wide = x.astype(at_least_float32(x.dtype))
        _, shards = shard_index("embed", self.strategy)
        mean = psum(jnp.mean(wide * wide, axis=-1, keepdims=True) / shards, "embed", self.strategy)
        scale = lax.rsqrt(mean + self.eps)
        return (wide * scale).astype(x.dtype) * self.weight.reshape(1, 1, -1)
