"""The memory traffic and the exchanges of a compiled program, from its HLO text.

XLA counts the operations of a program. Its count of bytes also has the accesses to on-chip memory, to which a TPU
program copies its operands, and it does not count exchanges. The HLO text has the memory space of each array.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from .limits import sent_share
from .report import Exchange


_LEAF = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = re.compile(r"[a-z]+(\d+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
# Groups are a list, `{{0,1},{2,3}}`, two counts, `[2,4]<=[8]`, or, from JAX 0.11 on, axes, `mesh['a'=4,'b'=2] {'b'}`.
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})")
_MESH_AXIS = re.compile(r"'([^']*)'=(\d+)")
# XLA may split an axis: the group along `'a':(1)2` has two of the devices of `'a'`.
_AXIS = re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")

# The results and the operands of a C++ kernel for CPUs.
_KERNEL = re.compile(
    r' = ([^=]*) custom-call\([^=]*custom_call_target="mistral_eqx_(\w+)".*?operand_layout_constraints=\{(.*?)\}, \w+='
)

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# These only name a buffer, or wait for the transfer of another instruction.
_MOVE_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("optimization-barrier", "iota", "copy-done", "slice-done", "dynamic-slice-done", "async-done", "async-update"),
    *(f"{kind}-done" for kind in _COLLECTIVES),
}


def kernel_flops(text: str) -> int:
    """The operations of the C++ kernels, which XLA does not count, each call once."""
    total = 0
    for results, name, operands in _KERNEL.findall(text):
        first, second = (_sizes(operands)[at] for at in (0, 1))
        if name == "attend":
            # Each query head meets the keys of its own key head, and as many values.
            total += 4 * math.prod(first) * second[2]
        else:
            # Each row of activations meets one weight for each result.
            total += 2 * math.prod(first) * sum(outputs for _, outputs in _sizes(results))
    return total


def _sizes(shapes: str) -> list[list[int]]:
    """The sizes of arrays."""
    return [[int(size) for size in filter(None, sizes.split(","))] for _, sizes, _ in _LEAF.findall(shapes)]


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array, or an element of a tuple: its size, and whether it is in HBM or in on-chip memory."""

    bytes: int
    in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a compiled program; `buffers` are those of its result."""

    name: str
    opcode: str
    buffers: tuple[Buffer, ...]
    operands: tuple[str, ...]
    rest: str

    @property
    def called(self) -> list[str]:
        """The computations that the instruction runs."""
        return [name for found in _CALLED.findall(self.rest) for name in _NAME.findall(found)]

    @property
    def hbm_bytes(self) -> int:
        """The bytes of the result in HBM."""
        return sum(buffer.bytes for buffer in self.buffers if buffer.in_hbm)


class Program:
    """A compiled program, parsed from its HLO text.

    **Arguments:**

    - `text`: the result of `jax.stages.Compiled.as_text`.
    """

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._roots: dict[str, Instruction] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        name = ""
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                name = line.removeprefix("ENTRY ").split()[0].split("(")[0].lstrip("%")
                current = self._computations[name] = {}
                if line.startswith("ENTRY"):
                    self.entry = name
            elif line.startswith(" ") and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    self._roots[name] = instruction

    def loop_body(self) -> str:
        """The body of the only loop of the entry computation."""
        loops = [one for one in self._computations[self.entry].values() if one.opcode == "while"]
        (loop,) = loops
        return re.findall(r"body=%([\w.\-]+)", loop.rest)[0]

    def traffic(self, computation: str) -> int:
        """The bytes that one run of a computation reads from HBM and writes to it.

        A slice or a gather counts only the entries that it takes, and an update in place only the update. A loop counts
        as often as its trip count, or once if that is not known.
        """
        scope = self._computations[computation]
        return sum(self._traffic_of(one, scope) for one in scope.values() if one.opcode != "while") + sum(
            self._trip_count(one) * self.traffic(body)
            for one in scope.values()
            if one.opcode == "while"
            for body in re.findall(r"body=%([\w.\-]+)", one.rest)
        )

    def exchanges(self, computation: str) -> list[Exchange]:
        """The exchanges of one run of a computation; equal operations are one entry."""
        totals: dict[tuple[str, int], tuple[int, int]] = {}
        for kind, devices, size, times in self._collectives(computation, 1):
            count, total = totals.get((kind, devices), (0, 0))
            totals[kind, devices] = count + times, total + times * size
        return [Exchange(kind, devices, count, total) for (kind, devices), (count, total) in totals.items()]

    def permutes_beside_products(self) -> tuple[int, int]:
        """How many permutes have a product between their start and their end in the schedule, and how many there are.

        Each computation counts once, however often it runs. The kernels of attention do not count as products.
        """
        beside = total = 0
        for scope in self._computations.values():
            under_way: dict[str, bool] = {}
            for one in scope.values():
                if one.opcode == "collective-permute-start":
                    under_way[one.name] = False
                elif one.opcode == "collective-permute-done":
                    beside, total = beside + under_way.pop(one.operands[0]), total + 1
                elif self._multiplies(one):
                    under_way = dict.fromkeys(under_way, True)
        return beside, total

    def _multiplies(self, one: Instruction) -> bool:
        if one.opcode in ("dot", "convolution"):
            return True
        called = one.called if one.opcode in ("fusion", "call") else []
        return any(self._multiplies(inner) for name in called for inner in self._computations[name].values())

    def _collectives(self, computation: str, times: int) -> Iterator[tuple[str, int, int, int]]:
        scope = self._computations[computation]
        for one in scope.values():
            kind = one.opcode.removesuffix("-start")
            if one.opcode == "fusion" and "calls=%all-reduce-scatter" in one.rest:
                # The TPU compiler writes a reduce-scatter as this fusion.
                inside = self._computations[one.called[0]].values()
                (devices,) = [_group(inner.rest) for inner in inside if inner.opcode == "all-reduce"]
                size = sum(buffer.bytes for buffer in scope[one.operands[0]].buffers)
                yield "reduce_scatter", devices, size, times
            elif kind in _COLLECTIVES:
                devices = _group(one.rest)
                size = sum(sum(buffer.bytes for buffer in scope[name].buffers) for name in one.operands)
                if devices != 1:
                    yield kind.replace("-", "_"), devices, size, times
            else:
                repeated = times * self._trip_count(one) if one.opcode == "while" else times
                for called in self._counted(one):
                    yield from self._collectives(called, repeated)

    def _counted(self, one: Instruction) -> list[str]:
        """The computations that an instruction runs; of branches that exchange something, the one that sends least."""
        if one.opcode != "conditional":
            return one.called
        sizes = [
            sum(sent_share(kind, devices) * size * times for kind, devices, size, times in self._collectives(name, 1))
            for name in one.called
        ]
        return [one.called[sizes.index(min(sizes))]] if any(sizes) else one.called

    def _trip_count(self, loop: Instruction) -> int:
        """The trip count of a loop: the known one, or the constant in its condition, or 1."""
        found = _TRIP_COUNT.search(loop.rest)
        if found is not None:
            return int(found[1])
        (name,) = _CONDITION.findall(loop.rest)
        scope, root = self._computations[name], self._roots[name]
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return 1
        limit = scope[root.operands[1]]
        return int(limit.rest) if limit.opcode == "constant" else 1

    def _traffic_of(self, one: Instruction, scope: dict[str, Instruction]) -> int:
        if one.opcode in _MOVE_NOTHING:
            return 0
        sources = [scope[name] for name in one.operands]
        match one.opcode:
            case "call" | "conditional" | "async-start":
                return sum(self.traffic(called) for called in self._counted(one))
            case "copy-start":
                return sum(buffer.bytes for buffer in one.buffers[:2] if buffer.in_hbm)
            case "slice-start" | "dynamic-slice-start":
                source, taken = one.buffers[:2]
                return taken.bytes * (source.in_hbm + taken.in_hbm)
            case "dynamic-update-slice":
                return sources[1].buffers[0].bytes * one.buffers[0].in_hbm + sources[1].hbm_bytes
            case "dynamic-slice" | "slice" | "gather":
                return one.buffers[0].bytes * (sources[0].buffers[0].in_hbm + one.buffers[0].in_hbm)
            case "fusion":
                return self._fusion_traffic(one, sources)
        if one.opcode.removesuffix("-start") in _COLLECTIVES:
            return 2 * sum(source.hbm_bytes for source in sources)
        return one.hbm_bytes + sum(source.hbm_bytes for source in sources)

    def _fusion_traffic(self, one: Instruction, sources: list[Instruction]) -> int:
        (name,) = one.called[:1]
        inside, root = self._computations[name], self._roots[name]
        parameters = {
            int(re.findall(r"\d+", line.rest)[0]): line for line in inside.values() if line.opcode == "parameter"
        }
        read = sum(_bytes_read(parameters[at], inside) for at, source in enumerate(sources) if source.buffers[0].in_hbm)
        results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written = sum(
            _bytes_written(line, inside) for line, buffer in zip(results, one.buffers, strict=False) if buffer.in_hbm
        )
        return read + written


def _parse(line: str) -> Instruction:
    name, _, definition = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(definition, 0) if definition.startswith("(") else definition.index(" ")
    shape, definition = definition[:end], definition[end:].lstrip()
    opcode, _, _ = definition.partition("(")
    start = len(opcode)
    stop = _closing(definition, start)
    operands = definition[start:stop]
    # A parameter has its number in place of operands, and a constant its value.
    rest = operands[1:-1] if opcode in ("parameter", "constant") else definition[stop:]
    return Instruction(name.lstrip("%"), opcode, _buffers(shape), tuple(_NAME.findall(operands)), rest)


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _buffers(shape: str) -> tuple[Buffer, ...]:
    return tuple(
        Buffer(math.ceil(_width(dtype) / 8 * math.prod(map(int, filter(None, sizes.split(","))))), "S(" not in layout)
        for dtype, sizes, layout in _LEAF.findall(shape)
    )


def _width(dtype: str) -> int:
    """The number of bits of an entry."""
    found = _BITS.match(dtype)
    return int(found[1]) if found is not None else 8 if dtype == "pred" else 0


def _group(rest: str) -> int:
    """The number of devices in the groups of an exchange; 0 if the text does not have it."""
    found = _GROUPS.search(rest)
    if found is None:
        return 0
    listed, counted, mesh, axes = found.groups()
    if listed is not None:
        return len(listed.split(","))
    if counted is not None:
        return int(counted)
    sizes = dict(_MESH_AXIS.findall(mesh))
    return math.prod(int(part or sizes[name]) for name, part in _AXIS.findall(axes))


def _bytes_read(parameter: Instruction, inside: dict[str, Instruction]) -> int:
    """The bytes of an operand that a fusion reads."""
    total = 0
    for use in _uses(parameter, inside):
        if use.opcode in ("dynamic-slice", "slice", "gather"):
            total += use.buffers[0].bytes
        elif use.opcode != "dynamic-update-slice" or parameter.name not in _aliased(use.operands[:1], inside):
            return parameter.buffers[0].bytes
    return min(total, parameter.buffers[0].bytes)


def _uses(line: Instruction, inside: dict[str, Instruction]) -> Iterator[Instruction]:
    for use in inside.values():
        if line.name in use.operands:
            if use.opcode == "bitcast":
                yield from _uses(use, inside)
            else:
                yield use


def _aliased(names: tuple[str, ...], inside: dict[str, Instruction]) -> set[str]:
    """These names, and the names that they are bitcasts of."""
    found = set(names)
    for name in names:
        if inside[name].opcode == "bitcast":
            found |= _aliased(inside[name].operands, inside)
    return found


def _bytes_written(result: Instruction, inside: dict[str, Instruction]) -> int:
    """The bytes of a result that a fusion writes."""
    while result.opcode == "bitcast":
        result = inside[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return inside[result.operands[1]].buffers[0].bytes
    return sum(buffer.bytes for buffer in result.buffers)
