"""The choice of tokens, where each row has numbers of its own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from ..generation import Sampler
from ..generation.processors import columns
from ..generation.sampler import column_ids, draw, first_argmax, in_nucleus, is_typical
from ..parallel import Strategy, pmax, psum


# No share: the row has no such filter.
_OFF = 2.0


class Numbers(eqx.Module):
    """The numbers of the samplers and processors of all rows.

    A step that no row asks for is skipped. The steps are those of [`mistral_eqx.Sampler`][] and of its processors.

    **Attributes:**

    - `temperature`: 0 for a greedy choice.
    - `top_k`: 0 for all tokens.
    - `top_p`, `min_p`, `typical_p`: a share above 1, and 0 for `min_p`, keep all tokens.
    - `repetition`, `presence`, `frequency`: penalties; 1, 0 and 0 change nothing.
    - `least`: the number of new tokens before an end token is allowed.
    """

    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]
    min_p: Float[Array, " batch"]
    typical_p: Float[Array, " batch"]
    repetition: Float[Array, " batch"]
    presence: Float[Array, " batch"]
    frequency: Float[Array, " batch"]
    least: Int[Array, " batch"]

    @classmethod
    def init(
        cls,
        batch: int,
        sampler: Sampler,
        *,
        repetition: float = 1.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        least: int = 0,
    ) -> "Numbers":
        """The same numbers for `batch` rows."""

        def by_row(value: Any, off: float | int, dtype: type = np.float32) -> Array:
            return jnp.asarray(np.full(batch, off if value is None else value, dtype))

        return cls(
            by_row(sampler.temperature, 0),
            by_row(sampler.top_k, 0, np.int32),
            by_row(sampler.top_p, _OFF),
            by_row(sampler.min_p, 0),
            by_row(sampler.typical_p, _OFF),
            by_row(repetition, 1),
            by_row(presence, 0),
            by_row(frequency, 0),
            by_row(least, 0, np.int32),
        )

    def process(
        self,
        logits: Float[Array, "batch vocab"],
        prompt: Bool[Array, "batch vocab"],
        counts: Int[Array, "batch vocab"],
        biases: Float[Array, "batch vocab"],
        ends: Int[Array, "batch ends"],
        step: Int[Array, " batch"],
        strategy: Strategy,
    ) -> Float[Array, "batch vocab"]:
        """The logits after all processors.

        **Arguments:**

        - `prompt`: which tokens are in each row's prompt.
        - `counts`: how often each row has generated each token.
        - `biases`: added to the logits.
        - `ends`: each row's end tokens, -1 for none.
        - `step`: the number of new tokens of each row.
        """

        def penalized(logits: Array) -> Array:
            seen, by = prompt | (counts > 0), self.repetition[:, None]
            logits = jnp.where(seen, jnp.where(logits < 0, logits * by, logits / by), logits)
            logits = logits - self.presence[:, None] * (counts > 0).astype(logits.dtype)
            return logits - self.frequency[:, None] * counts.astype(logits.dtype)

        def held_back(logits: Array) -> Array:
            ids = column_ids(logits, strategy)
            at = columns(jnp.where(ends < 0, jnp.iinfo(jnp.int32).max, ends), ids)
            rows = jnp.arange(len(ends))[:, None]
            forbidden = (step < self.least)[:, None]
            among = jnp.zeros(logits.shape, bool).at[rows, at].set(True, mode="drop")
            return jnp.where(among & forbidden, -jnp.inf, logits)

        any_penalty = (self.repetition != 1) | (self.presence != 0) | (self.frequency != 0)
        logits = where_any(any_penalty, penalized, logits, strategy) + biases
        return where_any(step < self.least, held_back, logits, strategy)

    def choose(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], strategy: Strategy
    ) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
        """Chooses one token a row, as [`mistral_eqx.Sampler`][] does, and returns the largest logit of each row."""
        token, largest = first_argmax(logits, strategy)
        draws = self.temperature > 0
        temperature = jnp.where(draws, self.temperature, 1)[:, None].astype(logits.dtype)

        def drawn(logits: Array) -> Array:
            kept = self._kept(logits, largest[:, None], temperature, strategy)
            return draw(kept, largest[:, None], temperature, keys, strategy)

        drawn_token = lax.cond(any_row(draws, strategy), drawn, lambda _: token, logits)
        return jnp.where(draws, drawn_token, token), largest

    def _kept(self, logits: Array, largest: Array, temperature: Array, strategy: Strategy) -> Array:
        """As `Sampler` filters: minus infinity for dropped tokens."""

        def best(logits: Array) -> Array:
            uses, least = (self.top_k > 0)[:, None], _kth_largest(logits, self.top_k, strategy)
            return jnp.where(uses & (logits < least), -jnp.inf, logits)

        def nucleus(logits: Array) -> Array:
            kept = in_nucleus(logits, largest, temperature, self.top_p[:, None], strategy)
            return jnp.where((self.top_p[:, None] > 1) | kept, logits, -jnp.inf)

        def likely(logits: Array) -> Array:
            least = largest + jnp.log(self.min_p[:, None]).astype(logits.dtype) * temperature.astype(logits.dtype)
            return jnp.where(logits < least, -jnp.inf, logits)

        def typical(logits: Array) -> Array:
            kept = is_typical(logits, largest, temperature, self.typical_p[:, None], strategy)
            return jnp.where((self.typical_p[:, None] > 1) | kept, logits, -jnp.inf)

        for uses, step in (
            (self.top_k > 0, best),
            (self.top_p <= 1, nucleus),
            (self.min_p > 0, likely),
            (self.typical_p <= 1, typical),
        ):
            logits = where_any(uses, step, logits, strategy)
        return logits


def any_row(rows: Bool[Array, " batch"], strategy: Strategy) -> Bool[Array, ""]:
    """Whether any row on any device is marked."""
    return pmax(jnp.any(rows).astype(jnp.int32), "batch", strategy) > 0


def where_any(rows: Bool[Array, " batch"], step: Callable[[Array], Array], logits: Array, strategy: Strategy) -> Array:
    """The logits after a step, if any row on any device asks for it; devices take the same branch."""
    return lax.cond(any_row(rows, strategy), step, lambda logits: logits, logits)


def _kth_largest(
    logits: Float[Array, "batch vocab"], k: Int[Array, " batch"], strategy: Strategy
) -> Float[Array, "batch 1"]:
    """The `k`-th largest logit of each row, found by its bits: the largest number that `k` logits reach."""
    dtype = logits.dtype
    unsigned = jnp.dtype(f"uint{8 * dtype.itemsize}")
    sign = unsigned.type(1 << (8 * dtype.itemsize - 1))
    bits = lax.bitcast_convert_type(logits, unsigned)
    # Unsigned integers in the order of the floats.
    order = jnp.where(bits >= sign, ~bits, bits | sign)
    # A split vocabulary is worth fewer exchanges of more counts.
    width = 4 if strategy.axes("vocab") else 1
    digits = np.arange(1, 2**width, dtype=unsigned)

    def next_digit(number: Array, reached: Array) -> Array:
        step = unsigned.type(1) << (8 * dtype.itemsize - width * (number + 1)).astype(unsigned)
        candidates = reached + digits[None] * step
        reach = jnp.sum(order[:, None, :] >= candidates[:, :, None], axis=-1, dtype=jnp.int32)
        enough = psum(reach, "vocab", strategy) >= k[:, None]
        return reached + step * jnp.sum(enough, axis=-1, keepdims=True, dtype=unsigned)

    # Starts at 0, in a form that shows `shard_map` along which axes rows differ.
    reached = lax.fori_loop(0, 8 * dtype.itemsize // width, next_digit, (k < 0).astype(unsigned)[:, None])
    return lax.bitcast_convert_type(jnp.where(reached >= sign, reached ^ sign, ~reached), dtype)
