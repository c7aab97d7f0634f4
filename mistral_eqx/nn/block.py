"""One layer of the model."""

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int

from .attention import Attention
from .cache import LayerCache
from .feed_forward import FeedForward
from .norm import RMSNorm
from .rotary import Rotation


class Block(eqx.Module):
    """Attention, then a feed-forward layer, each on the normalised residual stream and added to it."""

    attention_norm: RMSNorm
    attention: Attention
    feed_forward_norm: RMSNorm
    feed_forward: FeedForward

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        rotation: Rotation,
        mask: Bool[Array, "batch seq kv_seq"],
        cache: LayerCache | None,
        slot: Int[Array, ""],
    ) -> tuple[Float[Array, "batch seq embed"], LayerCache | None]:
        """Arguments and result are those of [`mistral_eqx.nn.Attention`][]."""
        mixed, cache = self.attention(self.attention_norm(x), rotation, mask, cache, slot)
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), cache
