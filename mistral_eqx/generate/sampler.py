"""From logits to the next token."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key


class Sampler(eqx.Module):
    """How the next token is chosen.

    Without arguments the choice is greedy: the token with the largest logit. With any of them a token is drawn, after
    these steps, in this order:

    - `temperature`: logits are divided by it; 1 unless given, and 0 is greedy again.
    - `top_k`: only the `top_k` largest logits stay ([Fan et al., 2018](https://arxiv.org/abs/1805.04833)).
    - `top_p`: only the smallest set of tokens whose probabilities sum to `top_p` stays
        ([Holtzman et al., 2019](https://arxiv.org/abs/1904.09751)).

    Ties at a border stay. `temperature` and `top_p` are arrays in a compiled program: another value of them
    compiles nothing anew.

    **Raises:** `ValueError` if a value is outside its range.
    """

    temperature: np.ndarray | Float[Array, ""] | None
    top_k: int | None = eqx.field(static=True)
    top_p: np.ndarray | Float[Array, ""] | None

    def __init__(self, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None):
        if temperature is not None and not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or a positive number.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1.")
        if temperature == 0 or (temperature is None and top_k is None and top_p is None):
            temperature = top_k = top_p = None
        elif temperature is None:
            temperature = 1.0
        # No draw tells these bounds from greedy and from uniform; beyond them a float32 would become 0 or infinity.
        self.temperature = None if temperature is None else np.asarray(np.clip(temperature, 1e-30, 1e30), np.float32)
        self.top_k = top_k
        self.top_p = None if top_p is None else np.asarray(top_p, np.float32)

    @property
    def greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature is None

    def __call__(self, logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"]) -> Int[Array, " batch"]:
        """Chooses one token a row.

        **Arguments:**

        - `logits`: shape `(batch, vocab)`.
        - `keys`: one a row, so that what a row draws does not depend on its neighbours.

        **Returns:** token ids, shape `(batch,)`.
        """
        if self.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jr.categorical)(keys, self.filter(logits)).astype(jnp.int32)

    def filter(self, logits: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """The logits from which a token is drawn: divided by the temperature, minus infinity for tokens left out."""
        if self.temperature is None:
            return logits
        logits = logits / self.temperature.astype(logits.dtype)
        if self.top_k is not None:
            largest = lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0]
            # The minimum, and not the last one: of that XLA on CPU makes a sort of all logits.
            logits = jnp.where(logits < jnp.min(largest, axis=-1, keepdims=True), -jnp.inf, logits)
        if self.top_p is not None:
            logits = jnp.where(_in_nucleus(logits, self.top_p), logits, -jnp.inf)
        return logits


def _in_nucleus(logits: Float[Array, "batch vocab"], top_p: Array | np.ndarray) -> Bool[Array, "batch vocab"]:
    """Which tokens are in the smallest set whose probabilities sum to `top_p`.

    Bisection finds the least probability of that set, bit by bit: 32 sums over a vocabulary take a small part of the
    time of a sort.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    # The bits of floats that are not negative, taken as integers, are in the floats' order.
    order = lax.bitcast_convert_type(probabilities, jnp.int32)
    # What is left out is summed, and not what stays: the sum of what stays is 1 before the last of many tokens.
    most = (1 - top_p).astype(jnp.float32)

    def halve(_, bounds):
        low, high = bounds
        middle = high - (high - low) // 2
        left_out = jnp.sum(jnp.where(order < middle, probabilities, 0), axis=-1, keepdims=True)
        return jnp.where(left_out <= most, middle, low), jnp.where(left_out <= most, high, middle - 1)

    bounds = jnp.min(order, axis=-1, keepdims=True), jnp.max(order, axis=-1, keepdims=True)
    least, _ = lax.fori_loop(0, 32, halve, bounds)
    return order >= least
