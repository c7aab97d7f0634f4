"""Batches without end, or for some epochs, from where one stopped."""

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
    """Gives one batch after the other, and can go on where another one stood."""

    def __iter__(self) -> "BatchIterator":
        """Itself."""
        ...

    def __next__(self) -> Batch:
        """The next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Where it stands, of numbers and dicts, to be written as JSON."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where an iterator of the same batches stood.

        **Raises:** `InputError` if those were others.
        """
        ...


@runtime_checkable
class Batches(Protocol):
    """What [`mistral_eqx.train.data.batches`][] returns: a dataset of Grain."""

    def __iter__(self) -> BatchIterator:
        """From the first batch on."""
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

    Each example comes once an epoch, in another order in each, and epochs follow each other without a gap: a batch may
    have the last examples of one and the first of the next. All that is drawn is drawn from the seed and the example's
    place in this order, so that an iterator that is set to another's state gives the same batches, also with another
    `shard`. It takes the extra `train`.

    **Arguments:**

    - `source`: examples, such as [`mistral_eqx.train.data.Sort`][], or what the objective makes them of, such as
        [`mistral_eqx.train.data.Pieces`][].
    - `rows`: of a batch, those of all processes together.
    - `seq`: how many columns a row has.
    - `objective`: makes an example of an item and a generator from which it may draw. Unless given, items that are ids
        are told one after the other, by [`mistral_eqx.train.causal`][].
    - `seed`: of the order and of what objectives draw; at least 0, below 2^32.
    - `shuffle`: whether the order is drawn; otherwise it is that of the source.
    - `epochs`: how often all examples come; without end unless given.
    - `packing`: whether a row has several examples, each in the first row with room, as by
        [`mistral_eqx.train.pack`][]. A batch is full when the next example fits nowhere. Each process packs all of it.
    - `shard`: which process this is, and of how many. Each has so many rows of each batch, one process after the other.
    - `remainder`: what becomes of examples at the end that do not fill a batch: `"drop"`, or `"pad"` to have them in a
        batch filled up with rows in which nothing counts, so that an evaluation sees all of them.

    **Raises:** `ValueError` if Grain is not installed, there are no examples or fewer than rows, processes do not
    divide the rows, or a number makes no sense. An example that does not fit into a row is refused when it comes.
    """
    if importlib.util.find_spec("grain") is None:
        raise InputError("Batches take Grain, which is not installed; run pip install 'mistral-eqx[train]'.")
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
        raise InputError(f"There is no process {index} of {count}; number them from 0.")
    if rows % count:
        raise InputError(f"{count} processes do not divide {rows} rows; change the number of rows.")
    if remainder == "pad" and epochs is None:
        raise InputError("Batches without end have no remainder to pad; give epochs=1 to see each example once.")
    if not len(source):
        raise InputError("The source has no examples, so there is nothing to learn; give at least one.")
    if remainder == "drop" and len(source) < rows:
        raise InputError(
            f"The source has {len(source)} examples, fewer than the {rows} rows of a batch; give more, make batches "
            "smaller, or take remainder='pad' with epochs=1."
        )
    # Grain takes a second to import, and is not there without the extra.
    from .pipeline import InOrder, in_rows, packed, stream

    examples = stream(source, objective, seq, seed, shuffle, epochs)
    arrange = packed if packing else in_rows
    made = arrange(examples, rows, seq, (index, count), remainder == "pad")
    order = {
        "rows": rows,
        "seq": seq,
        "seed": seed,
        "shuffle": shuffle,
        "epochs": epochs,
        "packing": packing,
        "number of examples": len(source),
        "examples": _content(source, objective),
    }
    return InOrder(made, order)


# By so many examples, or all if there are fewer, a source and an objective are known.
_KNOWN_BY = 256


def _content(source: Source, objective: Callable[[Any, np.random.Generator], Example] | None) -> str:
    """Another one if the examples are others: their files, their tokenizer, or what the objective makes of them."""
    content = hashlib.sha256()
    random = np.random.default_rng(0)
    for number in np.unique(np.linspace(0, len(source) - 1, _KNOWN_BY).astype(int)):
        try:
            item = source[int(number)]
            example = item if objective is None else objective(item, random)
        except InputError as error:  # which is said when its turn comes
            example = str(error)
        parts = example if isinstance(example, Example) else (example,)
        for part in parts:
            content.update(part.encode() if isinstance(part, str) else np.asarray(part).tobytes())
            content.update(b"\n")
    return content.hexdigest()[:16]
