"""One layer of the model."""

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int

from ..parallel import all_tokens
from .attention import Attention
from .cache import LayerCache
from .feed_forward import FeedForward
from .norm import RMSNorm
from .rotary import Rotation
from .visible import Span


class Block(eqx.Module):
    """Attention, then a feed-forward layer, each on the normalised residual stream and added to it.

    Where the strategy splits `tokens`, the stream, and with it the norms, is split over tokens.
    """

    attention_norm: RMSNorm
    attention: Attention
    feed_forward_norm: RMSNorm
    feed_forward: FeedForward

    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        rotation: Rotation,
        positions: Int[Array, "batch seq"],
        kv_positions: Int[Array, "batch kv_seq"],
        cache: LayerCache | None,
        slot: Int[Array, ""],
        seen: Bool[Array, "batch seq kv_seq"] | None = None,
        span: Span | None = None,
    ) -> tuple[Float[Array, "batch tokens embed"], LayerCache | None]:
        """Arguments and result are those of [`mistral_eqx.nn.Attention`][]; `x` may have this device's tokens only."""
        strategy, seq = self.attention.strategy, positions.shape[1]
        whole = all_tokens(self.attention_norm(x), seq, strategy)
        mixed, cache = self.attention(whole, rotation, positions, kv_positions, cache, slot, seen, span)
        x = x + mixed
        return x + self.feed_forward(all_tokens(self.feed_forward_norm(x), seq, strategy)), cache
