"""Root-mean-square normalisation."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .precision import at_least_float32


class RMSNorm(eqx.Module):
    """Scales vectors to a root mean square of one, then each entry by a weight
    ([Zhang and Sennrich, 2019](https://arxiv.org/abs/1910.07467)).

    The mean is taken in float32 at least, whatever the activations' precision.

    **Attributes:**

    - `weight`: one factor an entry, shape `(embed,)`.
    - `eps`: added to the mean of squares.
    """

    weight: Float[Array, " embed"]
    eps: float = eqx.field(static=True)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        wide = x.astype(at_least_float32(x.dtype))
        scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * self.weight.reshape(1, 1, -1)
