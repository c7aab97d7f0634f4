"""The gated feed-forward layer."""

import equinox as eqx
import jax
from jaxtyping import Array, Float

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

    @property
    def router(self) -> None:
        """None, since all tokens have the same weights."""

    def __call__(
        self, x: Float[Array, "batch own embed"], seq: int | None = None
    ) -> Float[Array, "batch tokens embed"]:
        """Applies the layer.

        **Arguments:**

        - `x`: activations; the tokens of this device where the strategy splits `tokens`.
        - `seq`: the number of tokens of each row over all devices; unless given, `x` has all of them.
        """
        whole = all_tokens(x, x.shape[1] if seq is None else seq, self.gate_proj.strategy)
        gate, up = project(whole, (self.gate_proj, self.up_proj))
        return self.down_proj(jax.nn.silu(gate) * up)
