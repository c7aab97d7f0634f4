"""Random keys for the dropout of adapters."""

import jax.random as jr
from jaxtyping import Array, Int, PRNGKeyArray

from ..errors import InputError
from ..lora import with_keys
from ..nn import Stacked


def with_dropout(model: Stacked, key: PRNGKeyArray, rows: Int[Array, " batch"]) -> Stacked:
    """The model with dropout keys in its adapters, a different one in each layer; see [`mistral_eqx.lora.with_keys`][].

    **Arguments:**

    - `key`: the key of the step.
    - `rows`: the index of each batch row in the whole batch.

    **Raises:** `InputError` if adapters have dropout and the strategy splits `layers`, or the blocks are in chunks.
    """
    outer, blocks = jr.split(key)
    pattern = with_keys(model.pattern, blocks, rows, layers=model.repeats)
    if (model.strategy.axes("layers") or model.chunks > 1) and pattern is not model.pattern:
        raise InputError(
            f"Adapters drop no entries under the strategy {model.strategy.layout!r}, which splits 'layers'; add them "
            "with dropout=0, or leave 'layers' out of it."
        )
    return Stacked(with_keys(model.outer, outer, rows), pattern, model.chunks)
