"""The report of a plan, per device."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import CacheDType
from .chips import Chip
from .training import Training


if TYPE_CHECKING:
    from rich.console import Group


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All exchanges of one kind among groups of one size.

    **Attributes:**

    - `kind`: the operation, such as `"all_reduce"`.
    - `devices`: the number of devices in a group.
    - `count`: the number of exchanges.
    - `bytes`: the input bytes of one device, over all exchanges.
    """

    kind: str
    devices: int
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a program on one device, in bytes.

    **Attributes:**

    - `weights`, `cache`: this device's shards of the weights and of the KV cache.
    - `other`: other arguments and results, and the padding of the arguments.
    - `temporary`: temporary buffers.
    - `code`: the program itself.
    - `optimizer`, `gradients`: in training, this device's shards of the moments and of the gradients.
    - `host`: the moments in host memory, which do not count in the total.
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
        """The bytes on the device."""
        named = self.weights + self.cache + self.optimizer + self.gradients
        return named + self.other + self.temporary + self.code


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of a program for each part of a chip, in seconds.

    **Attributes:**

    - `compute`: the time of the operations.
    - `memory`: the time of the traffic between memory and chip.
    - `interconnect`: the time of the exchanges between chips.
    - `bubble`: in the estimate of a pipeline, the time in which a stage has no micro-batch. A compiled program has
        none: there a stage computes something that is not used.
    """

    compute: float
    memory: float
    interconnect: float
    bubble: float = 0.0

    @property
    def seconds(self) -> float:
        """The longest of the first three, and the bubble: a lower bound, reached if they overlap completely."""
        return max(self.compute, self.memory, self.interconnect) + self.bubble

    @property
    def bound(self) -> str:
        """The name of the longest of the four."""
        return max(("compute", "memory", "interconnect", "bubble"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Phase:
    """One compiled program.

    **Attributes:**

    - `name`: `"prefill"`, which reads one chunk of the prompt; `"grow"`, which makes the cache larger for the new
        tokens; `"decode"`, whose values other than memory are per iteration of its loop; or `"step"`, of training.
    - `runs`: the number of runs; for prefill, the number of chunks.
    - `tokens`: the tokens of each row in one run.
    - `memory`: its memory on one device.
    - `flops`: the operations of one device.
    - `hbm_bytes`: the bytes that one device moves between its memory and the chip.
    - `once_bytes`: for a loop, the bytes moved before and after it.
    - `exchanges`: the exchanges between devices, in the compiled program.
    - `written`: the exchanges in the program before XLA compiles it, which may merge, split or replace some.
    - `compile_seconds`: the time to trace and to compile.
    - `roofline`: the least time of one run; `None` if there is no chip.
    - `refused`: XLA's message if the program does not fit into the memory, otherwise `None`. Then only the values that
        follow from shapes are known, and `memory.temporary` is XLA's total minus the rest.
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
    """The result of [`mistral_eqx.plan`][]: a model with a strategy, compiled for devices that are not here.

    **Attributes:**

    - `model`: the preset's name, or `"config"`.
    - `parameters`: the number of parameters.
    - `place`: the topology, or the number of virtual devices, as text.
    - `devices`: the number of devices.
    - `chip`: the chip; `None` for virtual devices.
    - `strategy`, `layout`, `axes`: the name and the text of the strategy, and the size of each mesh axis.
    - `batch`, `prompt`, `kv_seq`: the number of rows, tokens of each prompt, and slots of each row in the cache;
        training has no prompt and no cache, and both are 0.
    - `dtype`: the precision of weights, activations and cache; in training, of the forward and the backward pass.
    - `phases`: the programs, in the order in which they run.
    - `cache_dtype`: the codes of the cache; `None` for floats.
    - `training`: the options of training; `None` for generation.
    - `formats`: for a quantized model, the bytes of one device's weights by format: of blocks, such as `"NF4/64"`, and
        the precision of all others; empty for a model of floats.
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
    cache_dtype: CacheDType | None = None
    training: Training | None = None
    formats: dict[str, int] = dataclasses.field(default_factory=dict)

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
        """The free bytes of a device in the phase `peak`; negative if it does not fit, `None` without a chip."""
        return None if self.chip is None else self.chip.hbm_bytes - self.peak.memory.total

    @property
    def fits(self) -> bool | None:
        """Whether every phase fits into a device's memory; `None` without a chip."""
        return None if self.free is None else self.free >= 0 and all(phase.refused is None for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists and numbers."""
        return {
            **dataclasses.asdict(self),
            "phases": [_phase(phase) for phase in self.phases],
            "fits": self.fits,
            "free": self.free,
        }

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Report:
        """The report from the result of `to_dict`."""
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
        """The report as tables, for `rich.print`."""
        from .tables import table

        return table([self])

    def picture(self, path: str | Path):
        """Plots memory and times; see [`mistral_eqx.planning.picture`][]."""
        from .pictures import picture

        picture([self], path)


def _phase(phase: Phase) -> dict[str, Any]:
    fields = dataclasses.asdict(phase)
    fields["memory"]["total"] = phase.memory.total
    if phase.roofline is not None:
        fields["roofline"] |= {"seconds": phase.roofline.seconds, "bound": phase.roofline.bound}
    return fields


def read_phase(fields: dict[str, Any]) -> Phase:
    """The phase from an entry of `Report.to_dict`."""

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
