"""One layer of the model."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from ..errors import InputError
from ..parallel import LEADING, all_tokens
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
        """The activations, and the sums over this device's tokens without padding; `None` for a dense layer.

        A capacity of experts applies here alone.
        """
        x, _ = self._attended(x, context, None)
        normed = self.feed_forward_norm(x)
        if not isinstance(self.feed_forward, Experts):
            return x + self._fed(normed, context), None
        chosen, sums = self.feed_forward.routed(normed, context)
        return x + self.feed_forward.for_own_tokens(normed, context.seq, chosen), sums

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


class StagedBlock(eqx.Module):
    """One block of each stage of a pipeline, of which a device has that of its stage.

    **Attributes:**

    - `block`: these blocks, stacked.
    """

    block: Block = eqx.field(metadata={LEADING: "layers "})

    def __call__(
        self,
        x: Float[Array, "batch tokens embed"],
        context: Context,
        cache: AbstractLayerCache | None = None,
    ) -> tuple[Float[Array, "batch tokens embed"], AbstractLayerCache | None]:
        """Applies the block of this device, inside `shard_map`."""
        own = jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, self.block)
        return own(x, context, cache)


def check_whole(model: PyTree):
    """Refuses a model whose blocks are in stages, for what needs all layers one by one."""
    nodes = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, StagedBlock))
    if any(isinstance(node, StagedBlock) for node in nodes):
        raise InputError(
            "The model is one of mistral_eqx.nn.in_stages, whose blocks cannot be changed, saved or served; give "
            "mistral_eqx.nn.unstack of the stacked model in its place, or to mistral_eqx.save the stacked model."
        )
