"""One layer of the model."""

import equinox as eqx
from jaxtyping import Array, Float

from ..parallel import all_tokens, own_tokens
from .attention import Attention
from .cache import AbstractLayerCache
from .context import Context
from .experts import Experts
from .feed_forward import FeedForward
from .latent_attention import LatentAttention
from .norm import RMSNorm
from .router_sums import RouterSums


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
        x, cache = self._attended(x, context, cache)
        return x + self._fed(self.feed_forward_norm(x), context), cache

    def with_router_sums(
        self, x: Float[Array, "batch tokens embed"], context: Context
    ) -> tuple[Float[Array, "batch tokens embed"], RouterSums | None]:
        """The activations, and the sums over this device's tokens without padding; `None` for a dense layer."""
        x, _ = self._attended(x, context, None)
        normed, sums = self.feed_forward_norm(x), None
        if isinstance(self.feed_forward, Experts):
            counted = own_tokens(context.query_index >= 0, x.shape[1], context.strategy)
            sums = self.feed_forward.router_sums(normed, counted)
        return x + self._fed(normed, context), sums

    def _fed(self, normed: Array, context: Context) -> Array:
        if isinstance(self.feed_forward, FeedForward | Experts):
            return self.feed_forward.for_own_tokens(normed, context.seq)
        # A user's layer needs no more than a call with all tokens.
        return self.feed_forward(all_tokens(normed, context.seq, context.strategy))

    def _attended(
        self, x: Array, context: Context, cache: AbstractLayerCache | None
    ) -> tuple[Array, AbstractLayerCache | None]:
        mixed, cache = self.attention(self.attention_norm(x), context, cache)
        return x + mixed, cache
