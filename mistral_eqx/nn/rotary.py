"""Rotary position embedding."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ..parallel import AbstractNamed


class Rotation(eqx.Module):
    """Cosines and sines of the angle by which each pair of entries at each position is turned."""

    cos: Float[Array, "batch seq pairs"]
    sin: Float[Array, "batch seq pairs"]

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
        turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
        return turned.reshape(x.shape).astype(x.dtype)


class Rotary(AbstractNamed):
    """Turns pairs of entries by an angle that grows with the position
    ([RoFormer](https://arxiv.org/abs/2104.09864)).

    **Attributes:**

    - `inv_freq`: the angle of each pair per position, in radians, shape `(head_dim / 2,)`; a constant, which no
        gradient reaches. As an array it is split as `head_dim` is.
    """

    inv_freq: Float[Array, " pairs"]

    @classmethod
    def init(cls, head_dim: int, theta: float) -> "Rotary":
        """Sets the angle of pair `i` to `theta ** (-2 i / head_dim)`."""
        return cls(jnp.asarray(theta ** -(np.arange(0, head_dim, 2) / head_dim), jnp.float32))

    def __call__(self, positions: Int[Array, "batch seq"]) -> Rotation:
        """The rotation for tokens at `positions`, in float32 whatever the model's precision."""
        inv_freq = lax.stop_gradient(self.inv_freq)
        angles = positions.astype(inv_freq.dtype)[:, :, None] * inv_freq[None, None, :]
        return Rotation(jnp.cos(angles), jnp.sin(angles))

    def array_dims(self) -> dict[str, str]:
        return {"inv_freq": "head_dim"}
