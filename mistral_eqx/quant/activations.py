"""Weights whose activations are rounded too, as where both are multiplied in 8 bits."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ..nn import AbstractWeight
from ..parallel import SINGLE, Strategy, pmax
from .floats import LARGEST_FP8
from .wrapped import AbstractWrapped


Kind = Literal["int8", "float8_e4m3"]


class RoundedActivations(AbstractWrapped):
    """A weight that is multiplied by activations of 8 bits.

    Each token has a scale of its own, from its largest activation. Where devices split the inputs, it is that of all
    inputs: a `pmax` over these devices.

    With a threshold this is [LLM.int8()](https://arxiv.org/abs/2208.07339): activations at or above it are multiplied
    as they are, and only the others are rounded.

    **Attributes:**

    - `base`: any weight.
    - `kind`: what activations are rounded to: whole numbers from -127 to 127, or float8 e4m3.
    - `threshold`: the size from which activations are not rounded; `None` to round all.
    - `strategy`: the strategy of the layer.
    """

    base: AbstractWeight
    kind: Kind = eqx.field(static=True)
    threshold: float | None = eqx.field(static=True, default=None)
    strategy: Strategy = SINGLE

    def contract(self, x: Float[Array, "batch seq ..."], in_dims: str, out_dims: str) -> Float[Array, "batch seq ..."]:
        if self.threshold is None:
            return self.base.contract(self._rounded(x, in_dims), in_dims, out_dims)
        outside = jnp.abs(x) >= self.threshold
        parts = jnp.concatenate([self._rounded(jnp.where(outside, 0, x), in_dims), jnp.where(outside, x, 0)], axis=1)
        # The weight is read once for both.
        inside, rest = jnp.split(self.base.contract(parts, in_dims, out_dims), 2, axis=1)
        return inside + rest

    def _rounded(self, x: Array, in_dims: str) -> Array:
        """The nearest codes as numbers; gradients pass as if nothing were rounded."""
        limit = 127.0 if self.kind == "int8" else LARGEST_FP8
        largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=tuple(range(2, x.ndim)), keepdims=True)
        scale = pmax(largest, in_dims, self.strategy) / limit
        codes = jnp.where(scale > 0, x.astype(jnp.float32) / scale, 0)
        codes = jnp.clip(codes, -limit, limit)
        codes = jnp.round(codes) if self.kind == "int8" else codes.astype(jnp.float8_e4m3fn).astype(jnp.float32)
        return x + lax.stop_gradient((codes * scale).astype(x.dtype) - x)
