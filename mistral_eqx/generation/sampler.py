"""From logits to the next token."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt32

from ..checks import Count, NotNegative, PositiveShare, Share, checked
from ..documents import shown
from ..errors import InputError
from ..nn.precision import at_least_float32
from ..parallel import SINGLE, Strategy, gather, pmax, pmin, psum, shard_index
from .processors import AbstractProcessor


_ORDER_OF_1 = int(np.float32(1).view(np.int32))


class Sampler(eqx.Module):
    """How the next token is chosen.

    Without arguments the choice is greedy: the token with the largest logit. With any of the numbers a token is drawn,
    after these steps in this order:

    - `processors`: each changes the logits, in the given order; also for a greedy choice.
    - `temperature`: the logits are divided by it; 1 by default, and 0 is greedy.
    - `top_k`: keeps only the `top_k` largest logits ([Fan et al., 2018](https://arxiv.org/abs/1805.04833)).
    - `top_p`: keeps only the smallest set of tokens whose probabilities sum to `top_p`
        ([Holtzman et al., 2019](https://arxiv.org/abs/1904.09751)).
    - `min_p`: keeps only tokens at least `min_p` times as likely as the likeliest
        ([Nguyen et al., 2024](https://arxiv.org/abs/2407.01082)).
    - `typical_p`: orders tokens by how close their surprise, `-log(probability)`, is to its mean, and keeps only the
        first whose probabilities sum to `typical_p` ([Meister et al., 2022](https://arxiv.org/abs/2202.00666)).

    Ties at a threshold are kept. All numbers except `top_k` are arrays in a compiled program, so another value does not
    recompile it.

    If a strategy splits `vocab`, devices exchange candidates and sums, never logits.

    **Raises:** `ValueError` if a value is outside its range.
    """

    temperature: np.ndarray | Float[Array, ""] | None
    top_k: int | None = eqx.field(static=True)
    top_p: np.ndarray | Float[Array, ""] | None
    min_p: np.ndarray | Float[Array, ""] | None
    typical_p: np.ndarray | Float[Array, ""] | None
    processors: tuple[AbstractProcessor, ...]

    def __init__(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        processors: Sequence[AbstractProcessor] = (),
    ):
        temperature = checked(temperature, NotNegative | None, "temperature", remedy="0 is greedy")
        top_k = checked(top_k, Count | None, "top_k")
        top_p = checked(top_p, PositiveShare | None, "top_p")
        min_p = checked(min_p, Share | None, "min_p")
        typical_p = checked(typical_p, PositiveShare | None, "typical_p")
        if isinstance(processors, AbstractProcessor):
            raise InputError(f"{type(processors).__name__} is one processor; give a list, processors=[...].")
        if not isinstance(processors, Sequence):
            raise InputError(f"processors is {shown(processors)}; give a list of mistral_eqx.AbstractProcessor.")
        for processor in processors:
            if not isinstance(processor, AbstractProcessor):
                raise InputError(f"{shown(processor)} is no processor; give a mistral_eqx.AbstractProcessor.")
        if temperature == 0 or all(value is None for value in (temperature, top_k, top_p, min_p, typical_p)):
            temperature = top_k = top_p = min_p = typical_p = None
        elif temperature is None:
            temperature = 1.0
        # At these bounds a draw is greedy or uniform; beyond them a float32 would become 0 or infinity.
        self.temperature = None if temperature is None else np.asarray(np.clip(temperature, 1e-30, 1e30), np.float32)
        self.top_k = top_k
        self.top_p = None if top_p is None else np.asarray(top_p, np.float32)
        self.min_p = None if min_p is None else np.asarray(min_p, np.float32)
        self.typical_p = None if typical_p is None else np.asarray(typical_p, np.float32)
        self.processors = tuple(processors)

    @property
    def greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature is None

    def __call__(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], strategy: Strategy = SINGLE
    ) -> Int[Array, " batch"]:
        """Chooses one token a row.

        **Arguments:**

        - `logits`: the result of `process`, shape `(batch, vocab)`; inside `shard_map` this device's shard of the
            vocabulary.
        - `keys`: one a row, so that a draw does not depend on the other rows.
        - `strategy`: whether `vocab` is split, which does not change the draw.

        **Returns:** token ids, shape `(batch,)`.
        """
        return self.choose(logits, keys, strategy)[0]

    def choose(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], strategy: Strategy = SINGLE
    ) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
        """Chooses one token a row, and returns the largest logit of each row, which the choice needs in any case."""
        if self.temperature is None:
            return first_argmax(logits, strategy)
        largest = largest_logit(logits, strategy)
        kept = self._kept(logits, largest, self.temperature, strategy)
        return draw(kept, largest, self.temperature, keys, strategy), largest[:, 0]

    def process(
        self, logits: Float[Array, "batch vocab"], states: Sequence[PyTree], strategy: Strategy = SINGLE
    ) -> Float[Array, "batch vocab"]:
        """The logits after all processors."""
        if self.processors:
            ids = column_ids(logits, strategy)
            for processor, state in zip(self.processors, states, strict=True):
                logits = processor(logits, state, ids)
        return logits

    def next_states(
        self,
        states: Sequence[PyTree],
        tokens: Int[Array, " batch"],
        logits: Float[Array, "batch vocab"],
        strategy: Strategy = SINGLE,
    ) -> tuple[PyTree, ...]:
        """The processors' states after one more token a row, chosen from `logits`."""
        if not self.processors:
            return ()
        ids = column_ids(logits, strategy)
        return tuple(
            processor.next_state(state, tokens, ids) for processor, state in zip(self.processors, states, strict=True)
        )

    def filter(self, logits: Float[Array, "batch vocab"], strategy: Strategy = SINGLE) -> Float[Array, "batch vocab"]:
        """The logits of the draw: divided by the temperature, minus infinity for dropped tokens."""
        if self.temperature is None:
            return logits
        kept = self._kept(logits, largest_logit(logits, strategy), self.temperature, strategy)
        return kept / self.temperature.astype(logits.dtype)

    def _kept(
        self,
        logits: Float[Array, "batch vocab"],
        largest: Float[Array, "batch 1"],
        temperature: np.ndarray | Array,
        strategy: Strategy,
    ) -> Float[Array, "batch vocab"]:
        """Minus infinity for dropped tokens. Only the last step may drop the likeliest, whose logit is `largest`."""
        # The logits are compared undivided: XLA may compute a quotient twice and round it in two ways, and then the
        # largest logit would exceed the maximum.
        temperature = temperature.astype(logits.dtype)
        if self.top_k is not None:
            best = _top_k(logits, self.top_k)
            if strategy.axes("vocab"):
                # The overall largest are among the largest of each device.
                best = _top_k(gather(best, "vocab", strategy, axis=1), self.top_k)
            # The minimum, not the last one: for that XLA on CPU would sort all logits.
            logits = jnp.where(logits < jnp.min(best, axis=-1, keepdims=True), -jnp.inf, logits)
        if self.top_p is not None:
            logits = jnp.where(in_nucleus(logits, largest, temperature, self.top_p, strategy), logits, -jnp.inf)
        if self.min_p is not None:
            least = largest + jnp.log(self.min_p).astype(logits.dtype) * temperature
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.typical_p is not None:
            logits = jnp.where(is_typical(logits, largest, temperature, self.typical_p, strategy), logits, -jnp.inf)
        return logits


def gumbel(bits: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Gumbel noise from random bits: the argmax of `logits + noise` is a draw from their softmax.

    `jax.random.gumbel` uses 23 bits and ends near 15.9, so it draws unlikely tokens too seldom; its mode "high" takes
    twice the time. This one uses all 32 bits of as many random numbers and ends near 22.9: of tokens a billion times
    less likely than the likeliest, it misses less than one draw in a hundred.
    """
    uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    # -log(1 - uniform); for small values the first terms of its series are exact, and the difference is not.
    series = uniform * (1 + uniform * (1 / 2 + uniform / 3))
    exponential = jnp.where(uniform < 2.0**-7, series, -jnp.log(1 - jnp.minimum(uniform, 1 - 2.0**-24)))
    return -jnp.log(exponential)


def column_ids(logits: Float[Array, "*batch vocab"], strategy: Strategy) -> Int[Array, " vocab"]:
    """The token id of each column of these logits, which are this device's shard if `strategy` splits `vocab`."""
    part, _ = shard_index("vocab", strategy)
    size = logits.shape[-1]
    return part * size + jnp.arange(size, dtype=jnp.int32)


def draw(
    kept: Float[Array, "batch vocab"],
    largest: Float[Array, "batch 1"],
    temperature: Array | np.ndarray,
    keys: Key[Array, " batch"],
    strategy: Strategy,
) -> Int[Array, " batch"]:
    """Draws one token a row, as the argmax of logits and Gumbel noise.

    **Arguments:**

    - `kept`: the logits, minus infinity for dropped tokens.
    - `largest`: the largest logit of each row before tokens were dropped.
    - `temperature`: one number, or one a row of shape `(batch, 1)`.
    - `keys`: one a row.
    """
    part, parts = shard_index("vocab", strategy)
    size = kept.shape[-1]
    # This device's shard of the noise of the whole vocabulary; each entry depends only on the key and its index.
    noise = gumbel(jax.vmap(lambda key: jr.bits(key, (parts * size,), jnp.uint32))(keys))
    noise = lax.dynamic_slice_in_dim(noise, part * size, size, axis=1)
    # Relative to the largest logit: a small temperature would otherwise round the noise away.
    above = jnp.where(jnp.isfinite(largest), largest, 0)
    wide = at_least_float32(kept.dtype)
    token, _ = first_argmax((kept - above).astype(wide) / temperature.astype(wide) + noise.astype(wide), strategy)
    return token


def largest_logit(logits: Float[Array, "batch vocab"], strategy: Strategy) -> Float[Array, "batch 1"]:
    """The largest logit of each row, over all devices that split `vocab`."""
    return pmax(jnp.max(logits, axis=-1, keepdims=True), "vocab", strategy)


def _top_k(logits: Float[Array, "batch vocab"], k: int) -> Float[Array, "batch k"]:
    return lax.top_k(logits, min(k, logits.shape[-1]))[0]


def first_argmax(
    logits: Float[Array, "batch vocab"], strategy: Strategy
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """The first index of the largest logit, and that logit. Devices exchange 8 bytes a row."""
    # Two reductions, because XLA on CPU takes 2.5 times as long for one that carries the index along.
    largest = largest_logit(logits, strategy)
    ids = jnp.where(logits < largest, jnp.iinfo(jnp.int32).max, column_ids(logits, strategy))
    return pmin(jnp.min(ids, axis=-1), "vocab", strategy), largest[:, 0]


def _weights(
    logits: Float[Array, "batch vocab"],
    largest: Float[Array, "batch 1"],
    temperature: Array | np.ndarray,
    strategy: Strategy,
) -> tuple[Float[Array, "batch vocab"], Float[Array, "batch 1"]]:
    """Probabilities without normalization, of which the largest is 1; and their sum."""
    weights = jnp.exp(((logits - largest) / temperature).astype(jnp.float32))
    return weights, psum(jnp.sum(weights, axis=-1, keepdims=True), "vocab", strategy)


def in_nucleus(
    logits: Float[Array, "batch vocab"],
    largest: Float[Array, "batch 1"],
    temperature: Array | np.ndarray,
    top_p: Array | np.ndarray,
    strategy: Strategy,
) -> Bool[Array, "batch vocab"]:
    """Which tokens are in the smallest set whose probabilities sum to `top_p`."""
    weights, total = _weights(logits, largest, temperature, strategy)
    return _smallest_set(weights, total, _order(weights), _ORDER_OF_1, top_p, strategy)


def is_typical(
    logits: Float[Array, "batch vocab"],
    largest: Float[Array, "batch 1"],
    temperature: Array | np.ndarray,
    typical_p: Array | np.ndarray,
    strategy: Strategy,
) -> Bool[Array, "batch vocab"]:
    """Which tokens are in the smallest set of those with the most usual surprise that sums to `typical_p`."""
    weights, total = _weights(logits, largest, temperature, strategy)
    surprise = -jnp.log(jnp.maximum(weights / total, jnp.finfo(jnp.float32).tiny))
    mean = psum(jnp.sum(weights / total * surprise, axis=-1, keepdims=True), "vocab", strategy)
    # Less than 1, and nearest comes first.
    order = 2**30 - 1 - _order(jnp.abs(surprise - mean) / 128)
    highest = pmax(jnp.max(order, axis=-1, keepdims=True), "vocab", strategy)
    return _smallest_set(weights, total, order, highest, typical_p, strategy)


def _order(numbers: Float[Array, "batch vocab"]) -> Int[Array, "batch vocab"]:
    """Integers below 2**30 that are in the order of these numbers from 0 to 1."""
    # The bits of floats that are not negative have the order of the floats.
    return lax.bitcast_convert_type(numbers, jnp.int32)


def _smallest_set(
    weights: Float[Array, "batch vocab"],
    total: Float[Array, "batch 1"],
    order: Int[Array, "batch vocab"],
    highest: Int[Array, "batch 1"] | int,
    mass: Array | np.ndarray,
    strategy: Strategy,
) -> Bool[Array, "batch vocab"]:
    """Which tokens are in the smallest set with a fraction `mass` of all weights, from the highest order down.

    The first token is always in it.

    The lowest order of the set is found bit by bit: 30 sums over a vocabulary take much less time than a sort. If the
    vocabulary is split, each exchange finds 5 bits.
    """
    # Sums the dropped tokens, because the sum of the kept ones rounds to the total before the last of many tokens.
    most = (1 - mass).astype(jnp.float32) * total
    bits = 5 if strategy.axes("vocab") else 1
    digits = np.arange(1, 2**bits, dtype=np.int32)

    def next_digit(number: Array, least: Array) -> Array:
        step = jnp.left_shift(1, 30 - bits * (number + 1))
        candidates = least + digits[None, :] * step
        below = order[:, None, :] < candidates[:, :, None]
        left_out = psum(jnp.sum(jnp.where(below, weights[:, None, :], 0), axis=-1), "vocab", strategy)
        return least + step * jnp.sum(left_out <= most, axis=-1, keepdims=True, dtype=jnp.int32)

    # Starts at 0, in a form that shows `shard_map` along which axes rows differ.
    least = lax.fori_loop(0, 30 // bits, next_digit, (total < 0).astype(jnp.int32))
    return order >= jnp.minimum(least, highest)
