"""The gated feed-forward layer."""

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float

from ..parallel import all_tokens
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
        gate, up = project(x, (self.gate_proj, self.up_proj))
        return self.down_proj(jax.nn.silu(gate) * up)

    def for_own_tokens(self, x: Float[Array, "batch tokens embed"], seq: int) -> Float[Array, "batch tokens embed"]:
        """The result for the tokens of this device, of `seq` in each row over all devices."""
        return self(all_tokens(x, seq, self.gate_proj.strategy))

    def router_sums(self, x: Float[Array, "batch tokens embed"], counted: Bool[Array, "batch tokens"]) -> None:
        """`None`: the layer has no router."""
