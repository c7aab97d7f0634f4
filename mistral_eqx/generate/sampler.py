"""From logits to the next token."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key


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
        self.temperature = None if temperature is None else np.asarray(temperature, np.float32)
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
        vocab = logits.shape[-1]
        if self.top_k is None and self.top_p is None:
            return logits
        # The candidates, largest first: what top_k leaves, or everything.
        largest = lax.top_k(logits, vocab if self.top_k is None else min(self.top_k, vocab))[0]
        least = largest[:, -1:]
        if self.top_p is not None:
            probabilities = jax.nn.softmax(largest, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            kept = before < self.top_p.astype(logits.dtype)
            least = jnp.min(jnp.where(kept, largest, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits < least, -jnp.inf, logits)
