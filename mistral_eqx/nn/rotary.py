"""Rotary position embedding."""

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..parallel import SINGLE, Strategy, own_shard
from ..rope import QueryScaling, Rope
from .precision import at_least_float32


class Rotation(eqx.Module):
    """Cosines and sines of the angle by which each pair of entries at each position is rotated
    ([RoFormer](https://arxiv.org/abs/2104.09864)), times the factors by which the entries are scaled.
    """

    cos: Float[Array, "batch seq pairs"]
    sin: Float[Array, "batch seq pairs"]

    @classmethod
    def init(
        cls,
        rope: Rope,
        positions: Int[Array, "batch seq"],
        dtype: DTypeLike = jnp.float32,
        strategy: Strategy = SINGLE,
    ) -> "Rotation":
        """The rotation of tokens at `positions`.

        **Arguments:**

        - `rope`: the angles of all pairs; where the strategy splits `head_dim`, each device takes those of its shard.
        - `dtype`: the precision of the activations. Angles are float32 or wider.
        """
        dtype = at_least_float32(jnp.dtype(dtype))
        inv_freq = own_shard(jnp.asarray(rope.inv_freq, dtype), strategy.axes("head_dim"), axis=0)
        angles = positions.astype(dtype)[:, :, None] * inv_freq[None, None, :]
        return cls(jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude)

    def of_queries(self, scaling: QueryScaling | None, positions: Int[Array, "batch seq"]) -> "Rotation":
        """The rotation that also scales queries by their positions, -1 for padding."""
        scale = query_scale(scaling, positions, self.cos.dtype)
        return self if scale is None else Rotation(self.cos * scale[:, :, None], self.sin * scale[:, :, None])

    def __call__(self, x: Float[Array, "batch seq *heads head_dim"]) -> Float[Array, "batch seq *heads head_dim"]:
        """Rotates queries or keys.

        **Arguments:**

        - `x`: shape `(batch, seq, ..., head_dim)`; the entries of a pair are adjacent, Mistral's own order.

        **Returns:** an array like `x`.
        """
        batch, seq, pairs = self.cos.shape
        heads = x.ndim - 3
        cos = self.cos.reshape(batch, seq, *(1,) * heads, pairs)
        sin = self.sin.reshape(batch, seq, *(1,) * heads, pairs)
        paired = x.astype(cos.dtype).reshape(*x.shape[:-1], pairs, 2)
        first, second = paired[..., 0], paired[..., 1]
        rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
        return rotated.reshape(x.shape).astype(x.dtype)


def query_scale(
    scaling: QueryScaling | None, positions: Int[Array, "batch seq"], dtype: DTypeLike
) -> Float[Array, "batch seq"] | None:
    """The factor of the query at each position, in float32 or wider; -1 is padding."""
    if scaling is None:
        return None
    spans = jnp.maximum(positions, 0) // scaling.original_positions
    return 1 + scaling.beta * jnp.log1p(spans.astype(at_least_float32(jnp.dtype(dtype))))
