"""The gated feed-forward layer."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .linear import Linear, project


class FeedForward(eqx.Module):
    """SwiGLU ([Shazeer, 2020](https://arxiv.org/abs/2002.05202)): `down(silu(gate(x)) * up(x))`.

    **Attributes:**

    - `gate_proj`, `up_proj`: `embed` to `hidden`.
    - `down_proj`: `hidden` to `embed`.
    """

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch tokens embed"]:
        return self.for_own_tokens(x, x.shape[1])

    def for_own_tokens(self, x: Float[Array, "batch own embed"], seq: int) -> Float[Array, "batch tokens embed"]:
        """The result for the tokens of this device, of `seq` in each row over all devices."""
        gate, up = project(x, (self.gate_proj, self.up_proj), seq)
        return self.down_proj(jax.nn.silu(gate) * up)
