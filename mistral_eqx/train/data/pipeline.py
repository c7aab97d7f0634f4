"""The Grain pipelines behind [`mistral_eqx.train.data.batches`][]; no other file imports Grain."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import grain
import numpy as np
from jaxtyping import Shaped

from ...errors import InputError
from ..batch import Batch, Example, one_a_row
from ..objective import causal
from .source import Source


# One thread prefetches this many batches. Reading mapped memory needs no more threads.
_PREFETCH = 4


def stream(
    source: Source,
    objective: Callable[[Any, np.random.Generator], Example] | None,
    seq: int,
    seed: int,
    shuffle: bool,
    epochs: int | None,
) -> grain.MapDataset[Example]:
    """The examples of all epochs, by index."""
    items = grain.MapDataset.source(cast(Sequence[Any], source))
    items = items.shuffle(seed=seed) if shuffle else items
    return items.repeat(epochs).random_map(partial(_example, objective, seq), seed=seed)


def in_rows(
    examples: grain.MapDataset[Example], rows: int, seq: int, shard: tuple[int, int], pad: bool
) -> grain.IterDataset[Batch]:
    """One example per row."""
    dataset = grain.MapDataset.source(_InRows(examples, rows, seq, shard, pad))
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH))


def packed(
    examples: grain.MapDataset[Example], rows: int, seq: int, shard: tuple[int, int], pad: bool
) -> grain.IterDataset[Batch]:
    """As many examples per row as fit."""
    # No threads: prefetching single examples is slower, and Grain's thread for batches reports errors at exit.
    unpacked = examples.map(_columns).to_iter_dataset(grain.ReadOptions(num_threads=0))
    rows_of_examples = grain.experimental.FirstFitPackIterDataset(
        unpacked,
        length_struct=dict.fromkeys(Example._fields, seq),
        num_packing_bins=rows,
        shuffle_bins=False,
    )
    return rows_of_examples.batch(rows, drop_remainder=not pad, batch_fn=partial(_packed_batch, rows, shard))


@dataclasses.dataclass(frozen=True)
class _InRows:
    """One process's rows of each batch, by index."""

    examples: grain.MapDataset[Example]
    rows: int
    seq: int
    shard: tuple[int, int]
    pad: bool

    def __len__(self) -> int:
        whole, more = divmod(len(self.examples), self.rows)
        return whole + (self.pad and more > 0)

    def __getitem__(self, index: int) -> Batch:
        own = _shard_rows(self.rows, self.shard)
        numbers = range(index * self.rows + own.start, min(index * self.rows + own.stop, len(self.examples)))
        examples = [cast(Example, self.examples[number]) for number in numbers]
        return one_a_row([*examples, *[_EMPTY] * (own.stop - own.start - len(examples))], self.seq)


# A row with an empty example is all padding.
_NO_IDS = np.zeros(0, np.int32)
_EMPTY = Example(_NO_IDS, _NO_IDS, np.zeros(0, np.float32), _NO_IDS, _NO_IDS)


def _shard_rows(rows: int, shard: tuple[int, int]) -> slice:
    """The rows of a batch that belong to a process."""
    index, count = shard
    return slice(index * rows // count, (index + 1) * rows // count)


def _example(
    objective: Callable[[Any, np.random.Generator], Example] | None, seq: int, item: Any, random: np.random.Generator
) -> Example:
    if objective is not None and isinstance(item, Example):
        raise InputError(
            "The source's items are examples already, as those of Sort and Adder, and an objective makes examples of "
            "token ids; leave out the objective.",
            key="objective",
        )
    example = _as_example(item) if objective is None else objective(item, random)
    if len(example.inputs) > seq:
        raise InputError(
            f"An example of {len(example.inputs)} tokens does not fit into a row of {seq}; take a larger seq, or cut "
            "documents with data.Pieces.",
            key="seq",
        )
    return example


def _as_example(item: Any) -> Example:
    return item if isinstance(item, Example) else causal(item)


def _columns(example: Example) -> dict[str, Shaped[np.ndarray, " seq"]]:
    """The arrays that Grain packs; it uses the types of the first example for all."""
    types = {name: np.float32 if name == "weights" else np.int32 for name in Example._fields}
    return {name: np.asarray(getattr(example, name), types[name]) for name in types}


def _packed_batch(
    rows: int, shard: tuple[int, int], packed: Sequence[Mapping[str, Shaped[np.ndarray, " seq"]]]
) -> Batch:
    """One process's rows of a batch that Grain packed."""

    def own_rows(name: str) -> Shaped[np.ndarray, "batch seq"]:
        values = np.stack([row[name] for row in packed])
        return np.pad(values, ((0, rows - len(values)), (0, 0)))[_shard_rows(rows, shard)]

    columns = np.broadcast_to(np.arange(own_rows("inputs").shape[1], dtype=np.int32), own_rows("inputs").shape)
    # Grain numbers the sequences of a row from 1, and counts columns from the start of their sequence.
    padding, start = own_rows("inputs_segment_ids") == 0, columns - own_rows("inputs_positions")
    return Batch(
        inputs=own_rows("inputs"),
        targets=own_rows("targets"),
        weights=own_rows("weights"),
        positions=np.where(padding, -1, own_rows("positions")),
        first=np.where(padding, columns, start),
        last=np.where(padding, columns, start + own_rows("last")),
    )


class InOrder(grain.IterDataset[Batch]):
    """Batches with the values that fix their order. An iterator accepts only positions of the same batches."""

    def __init__(self, parent: grain.IterDataset[Batch], order: dict[str, Any]):
        super().__init__(parent)
        self.order = order

    def __iter__(self) -> grain.DatasetIterator[Batch]:
        return _InOrderIterator(iter(cast(grain.IterDataset[Batch], self._parent)), self.order)


class _InOrderIterator(grain.DatasetIterator[Batch]):
    def __init__(self, parent: grain.DatasetIterator[Batch], order: dict[str, Any]):
        super().__init__(parent)
        self._order = order

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"order": self._order, "position": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        if not state.keys() >= {"order", "position"}:
            raise InputError("The state is no position in these batches; start at the first one.")
        saved = state["order"]
        if changed := [name for name, value in self._order.items() if saved.get(name) != value]:
            changes = ", ".join(
                name if name == "examples" else f"{name} {saved.get(name)!r}, here {self._order[name]!r}"
                for name in changed
            )
            raise InputError(
                f"The position belongs to other batches: {changes}; make the same batches, or start at the first one."
            )
        self._parent.set_state(state["position"])
