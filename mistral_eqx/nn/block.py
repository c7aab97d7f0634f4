"""One layer of the model."""

import equinox as eqx
from jaxtyping import Array, Float

from ..parallel import all_tokens
from .attention import Attention
from .cache import AbstractLayerCache
from .context import Context
from .experts import Experts
from .feed_forward import FeedForward
from .latent_attention import LatentAttention
from .norm import RMSNorm


class Block(eqx.Module):
    """Attention, then a feed-forward layer or experts, each on the normalised residual stream and added to it.

    Where the strategy splits `tokens`, each device holds and normalises only its own tokens of the stream.
    """

    attention_norm: RMSNorm
    attention: Attention | LatentAttention
    feed_forward_norm: RMSNorm
    feed_forward: FeedForward | Experts

    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        context: Context,
        cache: AbstractLayerCache | None = None,
    ) -> tuple[Float[Array, "batch tokens embed"], AbstractLayerCache | None]:
        """Takes and returns what [`mistral_eqx.nn.Attention`][] does; `x` may hold this device's tokens only."""
        # All devices write the same latents into a cache, and JAX must know that they are the same.
        to = "varying" if cache is None else "invarying"
        whole = all_tokens(self.attention_norm(x), context.seq, context.strategy, to=to)
        mixed, cache = self.attention(whole, context, cache)
        x = x + mixed
        whole = all_tokens(self.feed_forward_norm(x), context.seq, context.strategy)
        return x + self.feed_forward(whole), cache
