"""Batches for any number of epochs, with a position that can be saved and restored."""

import hashlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from ...checks import Count, Seed, check_arguments
from ...errors import InputError
from ..batch import Batch, Example
from .source import Source


@runtime_checkable
class BatchIterator(Protocol):
    """An iterator over batches whose position can be saved and restored."""

    def __iter__(self) -> "BatchIterator":
        """The iterator itself."""
        ...

    def __next__(self) -> Batch:
        """The next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON types."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to the position of another iterator over the same batches.

        **Raises:** `InputError` if the position belongs to other batches.
        """
        ...


@runtime_checkable
class Batches(Protocol):
    """The Grain dataset that [`mistral_eqx.train.data.batches`][] returns."""

    def __iter__(self) -> BatchIterator:
        """An iterator that starts at the first batch."""
        ...


def batches(
    source: Source,
    *,
    rows: Count,
    seq: Count,
    objective: Callable[[Any, np.random.Generator], Example] | None = None,
    seed: Seed = 0,
    shuffle: bool = True,
    epochs: Count | None = None,
    packing: bool = False,
    shard: tuple[int, int] = (0, 1),
    remainder: Literal["drop", "pad"] = "drop",
) -> Batches:
    """Batches of a source, made by [Grain](https://google-grain.readthedocs.io).

    Each example appears once per epoch, in a different order in each epoch. Epochs follow each other without a gap: a
    batch may have the last examples of one epoch and the first of the next. Random numbers depend on the seed and the
    example's index in this order alone, so that an iterator whose state is restored gives the same batches, also with
    another `shard`. It needs the extra `train`.

    **Arguments:**

    - `source`: examples, such as [`mistral_eqx.train.data.Sort`][], or the items that the objective makes examples of,
        such as [`mistral_eqx.train.data.Pieces`][].
    - `rows`: the number of rows of a batch, over all processes.
    - `seq`: the number of columns of a row.
    - `objective`: makes an example of an item and a random generator. Unless given, items that are ids become examples
        of [`mistral_eqx.train.causal`][].
    - `seed`: the seed of the order and of the objective; at least 0, below 2^32.
    - `shuffle`: whether to shuffle the examples; otherwise they have the order of the source.
    - `epochs`: the number of epochs; without end unless given.
    - `packing`: whether a row has several examples, each in the first row with room, as with
        [`mistral_eqx.train.pack`][]. A batch is full when no row has room for the next example. Each process packs the
        whole batch.
    - `shard`: the index of this process, and the number of processes. Process `i` gets the `i`-th equal part of the
        rows of each batch.
    - `remainder`: for the examples at the end that do not fill a batch: `"drop"` leaves them out, `"pad"` gives a last
        batch padded with rows without weight, so that an evaluation uses all examples.

    **Raises:** `ValueError` if Grain is not installed, there are fewer examples than rows, the number of processes does
    not divide the rows, or an argument is out of its range. An example that does not fit into a row raises when its
    batch is made.
    """
    if importlib.util.find_spec("grain") is None:
        raise InputError("Batches need Grain, which is not installed; run pip install 'mistral-eqx[train]'.")
    check_arguments(
        batches,
        rows=rows,
        seq=seq,
        seed=seed,
        shuffle=shuffle,
        epochs=epochs,
        packing=packing,
        shard=shard,
        remainder=remainder,
    )
    index, count = shard
    if not 0 <= index < count:
        raise InputError(f"There is no process {index} of {count}; processes are numbered from 0.")
    if rows % count:
        raise InputError(f"{count} processes do not divide {rows} rows; change the number of rows.")
    if remainder == "pad" and epochs is None:
        raise InputError("Batches without end have no remainder to pad; give epochs=1 to see each example once.")
    if not len(source):
        raise InputError("The source has no examples; give at least one.")
    if remainder == "drop" and len(source) < rows:
        raise InputError(
            f"rows is {rows}, but the source has only {len(source)} examples; give more examples, use fewer rows, or "
            "remainder='pad' with epochs=1.",
            key="rows",
        )
    # Grain takes a second to import, and may not be installed.
    from .pipeline import InOrder, in_rows, packed, stream

    examples = stream(source, objective, seq, seed, shuffle, epochs)
    arrange = packed if packing else in_rows
    dataset = arrange(examples, rows, seq, (index, count), remainder == "pad")
    order = {
        "rows": rows,
        "seq": seq,
        "seed": seed,
        "shuffle": shuffle,
        "epochs": epochs,
        "packing": packing,
        "number of examples": len(source),
        "examples": _digest(source, objective),
    }
    return InOrder(dataset, order)


# The most examples that the digest of a source and an objective is made of.
_SAMPLES = 256


def _digest(source: Source, objective: Callable[[Any, np.random.Generator], Example] | None) -> str:
    """A digest of some examples, which changes with the files, the tokenizer or the objective."""
    digest = hashlib.sha256()
    random = np.random.default_rng(0)
    for number in np.unique(np.linspace(0, len(source) - 1, _SAMPLES).astype(int)):
        try:
            item = source[int(number)]
            example = item if objective is None else objective(item, random)
        except InputError as error:  # training raises it when it reaches this example
            example = str(error)
        fields = example if isinstance(example, Example) else (example,)
        for field in fields:
            digest.update(field.encode() if isinstance(field, str) else np.asarray(field).tobytes())
            digest.update(b"\n")
    return digest.hexdigest()[:16]
