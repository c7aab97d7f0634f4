"""The strategies that a model can have on a number of devices."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from annotated_types import Ge, Le
from jax.sharding import AbstractMesh, Mesh

from ..checks import Count, checked
from ..config import MistralConfig
from ..errors import InputError
from .mesh import MOST_DEVICES, make_mesh
from .strategy import HEADS_X_HEAD_DIM, NAMED, SINGLE, Strategy


# How devices share the tokens of rows.
_WAYS = (("ring", "seq@cp kv_seq@cp"), ("gather", "seq@cp"))


def read_strategy(text: str) -> Strategy:
    """Reads a strategy from its name, with or without further entries, or from its layout.

    **Arguments:**

    - `text`: such as `"heads"`, `"heads batch@dp"` or `"kv_heads@tp hidden@tp"`.

    **Raises:** `ValueError` if there is no such name.
    """
    checked(text, str, "strategy")
    name, _, entries = text.strip().partition(" ")
    named = {"single": SINGLE, **NAMED}.get(name.lower().replace("-", "_"))
    if named is not None:
        return named + entries if entries.strip() else named
    if "@" not in name:
        raise InputError(
            f"There is no strategy {name!r}; the names are single, {', '.join(NAMED)}, and a layout is, for example, "
            "'kv_heads@tp hidden@tp'."
        )
    return Strategy(text.strip())


@dataclasses.dataclass(frozen=True)
class Choice:
    """A strategy and the axes of its mesh.

    **Attributes:**

    - `name`: such as `"heads"`, or `"heads, batch over 2"` with two copies of the model.
    - `strategy`: which dimensions are split over which axes.
    - `axes`: the mesh's axes and their sizes.
    """

    name: str
    strategy: Strategy
    axes: dict[str, int]

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over `devices`, or over all devices."""
        return make_mesh(self.axes, devices)


def strategies(
    config: MistralConfig, n_devices: int, *, seq: int | None = None, micro_batches: int | None = None
) -> list[Choice]:
    """The named strategies that are legal for a model on a number of devices.

    Each comes with every mesh that it can have. The axis `dp`, which splits `batch`, takes some or none of the devices.
    The others go to the axis `tp`, or to the axes `kv`, which splits the key/value heads, and `rep`.

    **Arguments:**

    - `config`: the model's config.
    - `n_devices`: the number of devices.
    - `seq`: the number of tokens of a row. If given, the axis `cp` takes some of the devices in further choices: it
        splits the tokens of rows, whose keys travel along a ring or are gathered. These choices come after the others.
    - `micro_batches`: the number of micro-batches of a step of training. If given, the axis `pp` takes some of the
        devices in further choices, at most so many: it splits the layers into stages, with or without a named strategy
        on the other devices. These choices come last.

    **Returns:** the choices; those that split the weights over the most devices come first.
    """
    checked(config, MistralConfig, "config")
    n_devices = checked(n_devices, Annotated[int, Ge(1), Le(MOST_DEVICES)], "n_devices")
    seq, stages = checked(seq, Count | None, "seq"), checked(micro_batches, Count | None, "micro_batches") or 1
    lengths = [] if seq is None else [size for size in _divisors(n_devices)[1:] if seq % (2 * size) == 0]
    # What one more axis splits, and its size.
    more = [("", "", "", 1), *((*way, "cp", size) for size in lengths for way in _WAYS)]
    more += [("stages", "layers@pp", "pp", size) for size in _divisors(n_devices)[1:] if size <= stages]
    found = []
    for label, entries, axis, size in more:
        named = {"single": SINGLE, **NAMED} if axis == "pp" else NAMED
        for copies in _divisors(n_devices // size):
            for name, strategy in named.items():
                for axes in _axes(strategy, n_devices // size // copies):
                    choice = _with_axis(Choice(name, strategy, axes), label, entries, axis, size)
                    choice = _with_axis(choice, "batch", "batch@dp", "dp", copies)
                    if choice is not None and _is_legal(choice.strategy, config, choice.axes):
                        found.append(choice)
    return found


def _with_axis(choice: Choice | None, label: str, entries: str, axis: str, size: int) -> Choice | None:
    """The choice with one more axis of the mesh; `None` if its strategy splits one of the dimensions already."""
    if size == 1 or choice is None:
        return choice
    if "kv_seq" in entries and choice.strategy.axes("kv_seq"):
        return None
    return Choice(f"{choice.name}, {label} over {size}", choice.strategy + entries, {axis: size, **choice.axes})


def _axes(strategy: Strategy, devices: int) -> Iterator[dict[str, int]]:
    if not strategy.axes():
        if devices == 1:
            yield {}
        return
    if strategy.axes() == ("tp",):
        if devices > 1:
            yield {"tp": devices}
        return
    for rep in _divisors(devices)[1:]:
        # With one key/value group, this strategy equals `head_dim`.
        if rep < devices or strategy is not HEADS_X_HEAD_DIM:
            yield {"kv": devices // rep, "rep": rep}


def _is_legal(strategy: Strategy, config: MistralConfig, axes: dict[str, int]) -> bool:
    try:
        strategy.check(config, AbstractMesh(tuple(axes.values()), tuple(axes)))
    except ValueError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
