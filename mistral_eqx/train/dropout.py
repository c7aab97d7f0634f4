"""Random keys for the dropout of adapters."""

import jax.random as jr
from jaxtyping import Array, Int, PRNGKeyArray

from ..lora import with_keys
from ..nn import Stacked


def with_dropout(model: Stacked, key: PRNGKeyArray, rows: Int[Array, " batch"]) -> Stacked:
    """The model with dropout keys in its adapters, a different one in each layer; see [`mistral_eqx.lora.with_keys`][].

    **Arguments:**

    - `key`: the key of the step.
    - `rows`: the index of each batch row in the whole batch.
    """
    outer, blocks = jr.split(key)
    return Stacked(with_keys(model.outer, outer, rows), with_keys(model.pattern, blocks, rows, layers=model.repeats))
