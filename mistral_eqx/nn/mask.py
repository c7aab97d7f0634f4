"""The attention mask: which keys each query attends to."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Span(eqx.Module):
    """The attention span of each token, in columns of its row, where attention is not causal over the whole row.

    | attention | `first` | `last` |
    |---|---|---|
    | causal | 0 | its own column |
    | over packed documents | first column of its document | its own column |
    | bidirectional | 0, or first column of its document | the last column of the row or document |
    | prefix | 0 | its own column or the end of the prefix, whichever is later |

    **Attributes:**

    - `first`: the first column that each token attends to; 0 unless given.
    - `last`: the last column that each token attends to; its own column unless given.
    """

    first: Int[Array, "batch seq"] | None = None
    last: Int[Array, "batch seq"] | None = None


def bounds(
    positions: Int[Array, "batch seq"], window: int | None, span: Span | None = None
) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"]]:
    """The first and the last position that each query attends to.

    **Arguments:**

    - `positions`: the position of each query; a negative one is padding, which attends to nothing.
    - `window`: how many positions a query attends to on either side, itself included; `None` for all.
    - `span`: the attention span of each query, in the same positions; causal unless given.
    """
    first = span.first if span is not None and span.first is not None else jnp.zeros_like(positions)
    last = span.last if span is not None and span.last is not None else positions
    if window is not None:
        first, last = jnp.maximum(first, positions - window + 1), jnp.minimum(last, positions + window - 1)
    return first, jnp.where(positions < 0, -1, last)


def attention_mask(
    first: Int[Array, "batch seq"], last: Int[Array, "batch seq"], kv_positions: Int[Array, "batch kv_seq"]
) -> Bool[Array, "batch seq kv_seq"]:
    """The mask: which keys each query attends to.

    **Arguments:**

    - `first`, `last`: the first and the last position that each query attends to. A query whose `last` is negative
        attends to nothing.
    - `kv_positions`: the position of each key; a negative one is padding, and no query attends to it.
    """
    keys = kv_positions[:, None, :]
    return (keys >= jnp.maximum(first, 0)[:, :, None]) & (keys <= last[:, :, None])
