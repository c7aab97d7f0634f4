"""The input of a training step: sequences as examples, and examples in batch rows."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from ..errors import InputError
from ..nn import Span


class Example(NamedTuple):
    """One sequence as an objective made it; each array has one entry per column.

    **Attributes:**

    - `inputs`: the input token.
    - `targets`: the target token.
    - `weights`: the weight of the target in the loss; 0 where nothing is learned.
    - `positions`: the position of the input token, for the rotary embedding.
    - `last`: the last column that the token attends to. The first one is the first column of the sequence.
    """

    inputs: Int[np.ndarray, " seq"]
    targets: Int[np.ndarray, " seq"]
    weights: Float[np.ndarray, " seq"]
    positions: Int[np.ndarray, " seq"]
    last: Int[np.ndarray, " seq"]


class Batch(eqx.Module):
    """Rows of examples: numpy arrays on the host, JAX arrays in a step.

    **Attributes:**

    - `inputs`, `targets`, `weights`: as in [`mistral_eqx.train.Example`][].
    - `positions`: the positions of the tokens; each sequence starts again at 0, and padding has -1.
    - `first`, `last`: the first and the last column that each token attends to.
    """

    inputs: Int[Array | np.ndarray, "batch seq"]
    targets: Int[Array | np.ndarray, "batch seq"]
    weights: Float[Array | np.ndarray, "batch seq"]
    positions: Int[Array | np.ndarray, "batch seq"]
    first: Int[Array | np.ndarray, "batch seq"]
    last: Int[Array | np.ndarray, "batch seq"]

    @property
    def span(self) -> Span:
        """The attention span of each token, for [`mistral_eqx.nn.Mistral.hidden`][]."""
        return Span(jnp.asarray(self.first), jnp.asarray(self.last))


def one_a_row(examples: Sequence[Example], seq: int) -> Batch:
    """One example per row, padded on the right.

    **Arguments:**

    - `examples`: one per row.
    - `seq`: the number of columns of a row.

    **Raises:** `ValueError` if an example is longer than a row.
    """
    return _in_rows([[example] for example in examples], seq)


def pack(examples: Sequence[Example], seq: int) -> Batch:
    """Packs several examples into a row, each into the first row that has room for it, so that there is little padding.

    No example attends to another: positions start again, the mask is block-diagonal, and no target belongs to another
    sequence.

    **Arguments:**

    - `examples`: in any order. A batch has less padding if the longest come first.
    - `seq`: the number of columns of a row.

    **Returns:** as many rows as the examples need.

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


def cut(ids: Sequence[int] | Integer[np.ndarray, " tokens"], seq: int) -> list[Int[np.ndarray, " chunk"]]:
    """Cuts a long sequence into chunks, for rows of `seq` columns.

    **Returns:** chunks of at most `seq + 1` tokens. Each starts with the last token of the chunk before, which is no
    input there: every token but the first is a target once.
    """
    whole = np.asarray(ids, np.int32)
    return [whole[start : start + seq + 1] for start in range(0, max(1, len(whole) - 1), seq)]


def _in_rows(rows: Sequence[Sequence[Example]], seq: int) -> Batch:
    if not rows:
        raise InputError("There are no examples to make a batch of; give at least one.")
    shape = len(rows), seq
    columns = np.broadcast_to(np.arange(seq, dtype=np.int32), shape)
    # A padding token attends to itself alone, and no other token attends to it.
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
                    f"A sequence of {len(example.inputs)} tokens does not fit into a row of {seq}; cut it, or take a "
                    "larger seq.",
                    key="seq",
                )
            here = row, slice(start, stop)
            for name in ("inputs", "targets", "weights", "positions"):
                batch[name][here] = getattr(example, name)
            batch["first"][here], batch["last"][here] = start, start + example.last
            start = stop
    return Batch(**batch)
