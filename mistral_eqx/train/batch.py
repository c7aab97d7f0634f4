"""What a training step reads: texts as examples, and examples in the rows of a batch."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from ..errors import InputError
from ..nn import Span


class Example(NamedTuple):
    """One text as an objective made it, an entry a column.

    **Attributes:**

    - `inputs`: the token that the model reads.
    - `targets`: the token that it is to say there.
    - `weights`: how much that counts; 0 where nothing is learned.
    - `positions`: where the token stands, for the rotary embedding.
    - `last`: the last column that it sees. It sees all from the text's first one on.
    """

    inputs: Int[np.ndarray, " seq"]
    targets: Int[np.ndarray, " seq"]
    weights: Float[np.ndarray, " seq"]
    positions: Int[np.ndarray, " seq"]
    last: Int[np.ndarray, " seq"]


class Batch(eqx.Module):
    """Rows of examples, as numpy arrays on the host and as arrays of JAX in a step.

    **Attributes:**

    - `inputs`, `targets`, `weights`: as of an [`mistral_eqx.train.Example`][].
    - `positions`: likewise; they start again with each text, and are -1 for padding.
    - `first`, `last`: the first and the last column that each token sees.
    """

    inputs: Int[Array | np.ndarray, "batch seq"]
    targets: Int[Array | np.ndarray, "batch seq"]
    weights: Float[Array | np.ndarray, "batch seq"]
    positions: Int[Array | np.ndarray, "batch seq"]
    first: Int[Array | np.ndarray, "batch seq"]
    last: Int[Array | np.ndarray, "batch seq"]

    @property
    def span(self) -> Span:
        """Which columns each token sees, for [`mistral_eqx.nn.Mistral.hidden`][]."""
        return Span(jnp.asarray(self.first), jnp.asarray(self.last))


def one_a_row(examples: Sequence[Example], seq: int) -> Batch:
    """Each example in a row of its own, with padding behind it.

    **Arguments:**

    - `examples`: one a row.
    - `seq`: how many columns a row has.

    **Raises:** `ValueError` if an example is longer than a row.
    """
    return _in_rows([[example] for example in examples], seq)


def pack(examples: Sequence[Example], seq: int) -> Batch:
    """Several examples in a row, each in the first row that has room for it, so that there is little padding.

    No example sees another: positions start again, attention is block-diagonal, and no target is another text's.

    **Arguments:**

    - `examples`: in any order. A batch is fuller if the longest come first.
    - `seq`: how many columns a row has.

    **Returns:** as many rows as it takes.

    **Raises:** `ValueError` if an example is longer than a row.
    """
    rows: list[list[Example]] = []
    free: list[int] = []
    for example in examples:
        length = len(example.inputs)
        at = next((at for at, room in enumerate(free) if room >= length), len(rows))
        if at == len(rows):
            rows.append([])
            free.append(seq)
        rows[at].append(example)
        free[at] -= length
    return _in_rows(rows, seq)


def cut(ids: Sequence[int] | Integer[np.ndarray, " tokens"], seq: int) -> list[Int[np.ndarray, " piece"]]:
    """A long text in pieces, for rows of `seq` columns.

    **Returns:** pieces of at most `seq + 1` tokens. Each starts with the last token of the one before, which that one
    did not read: every token but the first is a target once.
    """
    whole = np.asarray(ids, np.int32)
    return [whole[start : start + seq + 1] for start in range(0, max(1, len(whole) - 1), seq)]


def _in_rows(rows: Sequence[Sequence[Example]], seq: int) -> Batch:
    if not rows:
        raise InputError("There are no examples to make a batch of; give at least one.")
    shape = len(rows), seq
    columns = np.broadcast_to(np.arange(seq, dtype=np.int32), shape)
    # Padding sees itself, which is never seen by others.
    batch = {
        "inputs": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
        "positions": np.full(shape, -1, np.int32),
        "first": columns.copy(),
        "last": columns.copy(),
    }
    for row, examples in enumerate(rows):
        start = 0
        for example in examples:
            stop = start + len(example.inputs)
            if stop > seq:
                raise InputError(
                    f"A text of {len(example.inputs)} tokens does not fit into a row of {seq}; cut it, or make the "
                    "rows longer."
                )
            here = row, slice(start, stop)
            for name in ("inputs", "targets", "weights", "positions"):
                batch[name][here] = getattr(example, name)
            batch["first"][here], batch["last"][here] = start, start + example.last
            start = stop
    return Batch(**batch)
