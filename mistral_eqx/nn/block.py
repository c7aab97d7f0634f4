"""One layer of the model."""

import equinox as eqx
from jaxtyping import Array, Float

from ..parallel import all_tokens
from .attention import Attention
from .cache import AbstractLayerCache
from .context import Context
from .experts import Experts
from .feed_forward import FeedForward
from .norm import RMSNorm


class Block(eqx.Module):
    """Attention, then a feed-forward layer or experts, each on the normalised residual stream and added to it.

    Where the strategy splits `tokens`, each device holds and normalises only its own tokens of the stream.
    """

    attention_norm: RMSNorm
    attention: Attention
    feed_forward_norm: RMSNorm
    feed_forward: FeedForward | Experts

    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        context: Context,
        cache: AbstractLayerCache | None = None,
    ) -> tuple[Float[Array, "batch tokens embed"], AbstractLayerCache | None]:
        """Takes and returns what [`mistral_eqx.nn.Attention`][] does; `x` may hold this device's tokens only."""
        whole = all_tokens(self.attention_norm(x), context.seq, context.strategy)
        mixed, cache = self.attention(whole, context, cache)
        x = x + mixed
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, Experts):
            return x + self.feed_forward(normed, context.seq), cache
        return x + self.feed_forward(all_tokens(normed, context.seq, context.strategy)), cache
