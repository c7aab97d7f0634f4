"""What a plan says, for each device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chips import Chip
from .training import Training


if TYPE_CHECKING:
    from rich.console import Group


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Exchanges of one kind among groups of one size, put together.

    **Attributes:**

    - `kind`: the operation, such as `"all_reduce"`.
    - `devices`: how many take part in each.
    - `count`: how many there are.
    - `bytes`: what one device puts into all of them.
    """

    kind: str
    devices: int
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """The bytes of one device's memory that a program takes.

    **Attributes:**

    - `weights`, `cache`: this device's parts of the model and of keys and values.
    - `other`: other arguments and results, and what the layout of the arguments adds to their size.
    - `temporary`: what the program needs besides.
    - `code`: the program itself.
    - `optimizer`, `gradients`: in training, this device's parts of the moments and of the gradients.
    - `host`: the moments that wait in the host's memory, which are not in the total.
    """

    weights: int
    cache: int = 0
    other: int = 0
    temporary: int = 0
    code: int = 0
    optimizer: int = 0
    gradients: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All of them that are on the device."""
        kept = self.weights + self.cache + self.optimizer + self.gradients
        return kept + self.other + self.temporary + self.code


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time, in seconds, that each part of a chip takes for a program.

    **Attributes:**

    - `compute`: for the operations.
    - `memory`: for the bytes between memory and chip.
    - `interconnect`: for the exchanges between chips.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The longest of the three: nothing can be faster, and only what overlaps in full is as fast."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def bound(self) -> str:
        """Which of the three that is."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Phase:
    """One compiled program.

    **Attributes:**

    - `name`: `"prefill"`, which reads a piece of the prompt; `"grow"`, which makes room in the cache for the new
        tokens; `"decode"`, whose figures other than memory are those of one turn of its loop; or `"step"`, of training.
    - `runs`: how often it runs; for a prompt that is read in pieces, how many there are.
    - `tokens`: the tokens of each row that a run computes.
    - `memory`: what it takes of one device's memory.
    - `flops`: the operations of one device.
    - `hbm_bytes`: the bytes that one device moves between its memory and the chip.
    - `once_bytes`: for a loop, the bytes moved before and after it.
    - `exchanges`: between devices, in the compiled program.
    - `written`: the same before XLA has merged, split or replaced any.
    - `compile_seconds`: how long it took to trace and to compile.
    - `roofline`: the least time of one run, where the chip is known.
    - `refused`: what XLA said, where the program does not fit into the memory. Then it has no more figures than those
        that follow from shapes, and `memory.temporary` is what XLA said minus the rest.
    """

    name: str
    runs: int
    tokens: int
    memory: Memory
    flops: float
    hbm_bytes: int
    once_bytes: int
    exchanges: tuple[Exchange, ...]
    written: tuple[Exchange, ...]
    compile_seconds: float
    roofline: Roofline | None
    refused: str | None

    @property
    def seconds(self) -> float | None:
        """The least time of all runs."""
        return None if self.roofline is None else self.runs * self.roofline.seconds


@dataclasses.dataclass(frozen=True)
class Report:
    """A model under a strategy on devices that are not here, as [`mistral_eqx.plan`][] compiled it.

    **Attributes:**

    - `model`: the preset's name, or `"config"`.
    - `parameters`: the number of its weights.
    - `place`: the topology, or how many virtual devices.
    - `devices`: how many there are.
    - `chip`: their figures; `None` for virtual devices.
    - `strategy`, `layout`, `axes`: its name, its text, and the size of each axis of the mesh.
    - `batch`, `prompt`, `kv_seq`: rows, tokens of each row's prompt, slots of each row in the cache; training has no
        prompt and no cache, and both are 0.
    - `dtype`: the precision of weights, activations and cache; in training, of the forward and the backward pass.
    - `phases`: the programs, in the order in which they run.
    - `training`: how the model is trained, if it is.
    """

    model: str
    parameters: int
    place: str
    devices: int
    chip: Chip | None
    strategy: str
    layout: str
    axes: dict[str, int]
    batch: int
    prompt: int
    kv_seq: int
    dtype: str
    phases: tuple[Phase, ...]
    training: Training | None = None

    def __getitem__(self, name: str) -> Phase:
        """One of the phases, such as `report["decode"]`."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)

    @property
    def peak(self) -> Phase:
        """The phase that takes the most memory."""
        return max(self.phases, key=lambda phase: phase.memory.total)

    @property
    def free(self) -> int | None:
        """What is left of a device's memory in that phase; negative where it does not fit. `None` without a chip."""
        return None if self.chip is None else self.chip.hbm_bytes - self.peak.memory.total

    @property
    def fits(self) -> bool | None:
        """Whether every phase fits into a device's memory; `None` without a chip."""
        return None if self.free is None else self.free >= 0 and all(phase.refused is None for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists and numbers."""
        return {
            **dataclasses.asdict(self),
            "phases": [_phase(phase) for phase in self.phases],
            "fits": self.fits,
            "free": self.free,
        }

    def to_json(self) -> str:
        """Everything as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Report:
        """The report that `to_dict` took apart."""
        fields = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
        chip, phases, training = fields["chip"], fields["phases"], fields["training"]
        return cls(
            **{
                **fields,
                "chip": None if chip is None else Chip(**chip),
                "phases": tuple(read_phase(phase) for phase in phases),
                "training": None if training is None else Training(**training),
            }
        )

    def table(self) -> Group:
        """The figures as tables, for `rich.print`."""
        from .tables import table

        return table([self])

    def picture(self, path: str | Path):
        """Draws memory and times; see [`mistral_eqx.planning.picture`][]."""
        from .pictures import picture

        picture([self], path)


def _phase(phase: Phase) -> dict[str, Any]:
    fields = dataclasses.asdict(phase)
    fields["memory"]["total"] = phase.memory.total
    if phase.roofline is not None:
        fields["roofline"] |= {"seconds": phase.roofline.seconds, "bound": phase.roofline.bound}
    return fields


def read_phase(fields: dict[str, Any]) -> Phase:
    """The phase that `Report.to_dict` took apart."""

    def read(kind: Any, fields: dict[str, Any]) -> Any:
        return kind(**{field.name: fields[field.name] for field in dataclasses.fields(kind)})

    return read(
        Phase,
        {
            **fields,
            "memory": read(Memory, fields["memory"]),
            "exchanges": tuple(Exchange(**entry) for entry in fields["exchanges"]),
            "written": tuple(Exchange(**entry) for entry in fields["written"]),
            "roofline": None if fields["roofline"] is None else read(Roofline, fields["roofline"]),
        },
    )
