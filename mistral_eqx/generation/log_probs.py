"""Log-probabilities of the chosen tokens, and of the likeliest alternatives."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..parallel import Strategy, gather, pmax, psum, shard_index


class LogProbs(eqx.Module):
    """The model's own log-probabilities at each new token, before processors and sampler.

    **Attributes:**

    - `chosen`: the logarithm of the chosen token's probability.
    - `tokens`, `top`: the likeliest tokens, likeliest first, and the logarithms of their probabilities.
    """

    chosen: Float[Array, "batch new"]
    tokens: Int[Array, "batch new top"]
    top: Float[Array, "batch new top"]

    @classmethod
    def init(cls, batch: int, new: int, top: int) -> "LogProbs":
        """Room for `new` tokens, with `top` others at each."""
        return cls(
            jnp.zeros((batch, new), jnp.float32),
            jnp.zeros((batch, new, top), jnp.int32),
            jnp.zeros((batch, new, top), jnp.float32),
        )

    def record(
        self, logits: Float[Array, "batch vocab"], token: Int[Array, " batch"], step: Int[Array, ""], strategy: Strategy
    ) -> "LogProbs":
        """Records one step. If `vocab` is split, each device sends its `top` candidates and three numbers a row."""
        logits, size = logits.astype(jnp.float32), logits.shape[1]
        largest = pmax(jnp.max(logits, axis=1, keepdims=True), "vocab", strategy)
        logits = logits - largest
        normalizer = jnp.log(psum(jnp.sum(jnp.exp(logits), axis=1, keepdims=True), "vocab", strategy))
        part, _ = shard_index("vocab", strategy)
        own = token[:, None] - part * size
        chosen = jnp.take_along_axis(logits, jnp.clip(own, 0, size - 1), axis=1)
        chosen = psum(jnp.where((own >= 0) & (own < size), chosen, 0), "vocab", strategy) - normalizer
        recorded = LogProbs(lax.dynamic_update_slice_in_dim(self.chosen, chosen, step, axis=1), self.tokens, self.top)
        count = self.top.shape[2]
        if count == 0:
            return recorded
        top, tokens = lax.top_k(logits, min(count, size))
        if strategy.axes("vocab"):
            # Ties go to the smallest id, because devices are in the order of their tokens.
            tokens = gather(tokens + part * size, "vocab", strategy, axis=1)
            top, among = lax.top_k(gather(top, "vocab", strategy, axis=1), count)
            tokens = jnp.take_along_axis(tokens, among, axis=1)
        top = (top - normalizer)[:, None]
        return LogProbs(
            recorded.chosen,
            lax.dynamic_update_slice_in_dim(self.tokens, tokens[:, None], step, axis=1),
            lax.dynamic_update_slice_in_dim(self.top, top, step, axis=1),
        )

    def grow(self, new: int) -> "LogProbs":
        """The same with room for `new` tokens."""
        more = (0, 0), (0, new - self.chosen.shape[1])
        return LogProbs(
            jnp.pad(self.chosen, more), jnp.pad(self.tokens, (*more, (0, 0))), jnp.pad(self.top, (*more, (0, 0)))
        )
