"""The pipelines of Grain behind [`mistral_eqx.train.data.batches`][]; the one file that imports it."""

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


# So many batches are made ahead by a thread beside the training. To read mapped memory takes no more threads.
_AHEAD = 4


def stream(
    source: Source,
    objective: Callable[[Any, np.random.Generator], Example] | None,
    seq: int,
    seed: int,
    shuffle: bool,
    epochs: int | None,
) -> grain.MapDataset[Example]:
    """The examples of all epochs, by number."""
    items = grain.MapDataset.source(cast(Sequence[Any], source))
    items = items.shuffle(seed=seed) if shuffle else items
    return items.repeat(epochs).random_map(partial(_example, objective, seq), seed=seed)


def in_rows(
    examples: grain.MapDataset[Example], rows: int, seq: int, shard: tuple[int, int], pad: bool
) -> grain.IterDataset[Batch]:
    """One example a row."""
    made = grain.MapDataset.source(_InRows(examples, rows, seq, shard, pad))
    return made.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD))


def packed(
    examples: grain.MapDataset[Example], rows: int, seq: int, shard: tuple[int, int], pad: bool
) -> grain.IterDataset[Batch]:
    """As many examples a row as fit."""
    # Without a thread: one for each example costs more than it gains, and Grain's for batches complains at exit.
    one_after_the_other = examples.map(_columns).to_iter_dataset(grain.ReadOptions(num_threads=0))
    found = grain.experimental.FirstFitPackIterDataset(
        one_after_the_other,
        length_struct=dict.fromkeys(Example._fields, seq),
        num_packing_bins=rows,
        shuffle_bins=False,
    )
    return found.batch(rows, drop_remainder=not pad, batch_fn=partial(_packed_batch, rows, shard))


@dataclasses.dataclass(frozen=True)
class _InRows:
    """A process's part of each batch, by number."""

    examples: grain.MapDataset[Example]
    rows: int
    seq: int
    shard: tuple[int, int]
    pad: bool

    def __len__(self) -> int:
        whole, more = divmod(len(self.examples), self.rows)
        return whole + (self.pad and more > 0)

    def __getitem__(self, index: int) -> Batch:
        own = _part(self.rows, self.shard)
        numbers = range(index * self.rows + own.start, min(index * self.rows + own.stop, len(self.examples)))
        found = [cast(Example, self.examples[number]) for number in numbers]
        return one_a_row([*found, *[_NONE] * (own.stop - own.start - len(found))], self.seq)


# An example of no tokens leaves its row to padding.
_IDS = np.zeros(0, np.int32)
_NONE = Example(_IDS, _IDS, np.zeros(0, np.float32), _IDS, _IDS)


def _part(rows: int, shard: tuple[int, int]) -> slice:
    """Which rows of a batch are a process's."""
    index, count = shard
    return slice(index * rows // count, (index + 1) * rows // count)


def _example(
    objective: Callable[[Any, np.random.Generator], Example] | None, seq: int, item: Any, random: np.random.Generator
) -> Example:
    example = _given(item) if objective is None else objective(item, random)
    if len(example.inputs) > seq:
        raise InputError(
            f"An example of {len(example.inputs)} tokens does not fit into a row of {seq}; cut texts "
            "shorter with data.Pieces, or make the rows longer."
        )
    return example


def _given(item: Any) -> Example:
    return item if isinstance(item, Example) else causal(item)


def _columns(example: Example) -> dict[str, Shaped[np.ndarray, " seq"]]:
    """What Grain packs. It takes the first example's types for all."""
    types = {name: np.float32 if name == "weights" else np.int32 for name in Example._fields}
    return {name: np.asarray(getattr(example, name), types[name]) for name in types}


def _packed_batch(
    rows: int, shard: tuple[int, int], found: Sequence[Mapping[str, Shaped[np.ndarray, " seq"]]]
) -> Batch:
    """A process's part of a batch that Grain packed."""

    def own_rows(name: str) -> Shaped[np.ndarray, "batch seq"]:
        values = np.stack([row[name] for row in found])
        return np.pad(values, ((0, rows - len(values)), (0, 0)))[_part(rows, shard)]

    columns = np.broadcast_to(np.arange(own_rows("inputs").shape[1], dtype=np.int32), own_rows("inputs").shape)
    # Grain counts texts from 1, and columns from where their text begins.
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
    """Batches that know what their order follows from. An iterator goes on only where one of the same batches stood."""

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
            raise InputError("The state is no position among such batches; begin at the first one.")
        then = state["order"]
        if changed := [name for name, value in self._order.items() if then.get(name) != value]:
            what = ", ".join(
                name if name == "examples" else f"{name} {then.get(name)!r}, here {self._order[name]!r}"
                for name in changed
            )
            raise InputError(
                f"The position is one among other batches: {what}; make them as they were, or begin at the first one."
            )
        self._parent.set_state(state["position"])
