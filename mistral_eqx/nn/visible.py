"""Which keys each query sees."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Span(eqx.Module):
    """Which columns of its row each token sees, where that is not all before it.

    | attention | `first` | `last` |
    |---|---|---|
    | causal | 0 | its own column |
    | over packed documents | where its document begins | its own column |
    | bidirectional | 0, or where its document begins | the last column of the row or document |
    | prefix | 0 | its own column or the end of the prefix, whichever is later |

    **Attributes:**

    - `first`: the first column that each token sees; 0 unless given.
    - `last`: the last one; its own unless given.
    """

    first: Int[Array, "batch seq"] | None = None
    last: Int[Array, "batch seq"] | None = None


def bounds(
    positions: Int[Array, "batch seq"], window: int | None, span: Span | None = None
) -> tuple[Int[Array, "batch seq"], Int[Array, "batch seq"]]:
    """The first and the last position that each query sees.

    **Arguments:**

    - `positions`: the position of each query; a negative one is padding and sees nothing.
    - `window`: how many positions a query sees to either side, itself included, or `None` for all.
    - `span`: what it sees at most, in the same positions; all up to itself unless given.
    """
    first = span.first if span is not None and span.first is not None else jnp.zeros_like(positions)
    last = span.last if span is not None and span.last is not None else positions
    if window is not None:
        first, last = jnp.maximum(first, positions - window + 1), jnp.minimum(last, positions + window - 1)
    return first, jnp.where(positions < 0, -1, last)


def visible(
    first: Int[Array, "batch seq"], last: Int[Array, "batch seq"], kv_positions: Int[Array, "batch kv_seq"]
) -> Bool[Array, "batch seq kv_seq"]:
    """Which keys each query sees.

    **Arguments:**

    - `first`, `last`: the first and the last position that each query sees, neither of them negative for one that
        sees any.
    - `kv_positions`: the position of each key; a negative one is padding and is never seen.
    """
    keys = kv_positions[:, None, :]
    return (keys >= jnp.maximum(first, 0)[:, :, None]) & (keys <= last[:, :, None])
