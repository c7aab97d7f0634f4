"""What a compiled program moves between devices and to and from their memory, read from its text.

XLA counts the operations of a program, but its count of bytes has every access in it, also those to memory on the chip
that a TPU program copies its operands to, and it does not count exchanges. The text says where each array lies.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from .report import Exchange


_LEAF = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_BITS = re.compile(r"[a-z]+(\d+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
# Groups are a list, `{{0,1},{2,3}}`, two counts, `[2,4]<=[8]`, or, from JAX 0.11 on, axes, `mesh['a'=4,'b'=2] {'b'}`.
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})")
_MESH_AXIS = re.compile(r"'([^']*)'=(\d+)")
# XLA may split an axis: the group along `'a':(1)2` has two of the devices of `'a'`.
_AXIS = re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# These name a place in memory, or wait for what another one moves.
_MOVE_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("optimization-barrier", "iota", "copy-done", "slice-done", "dynamic-slice-done", "async-done", "async-update"),
    *(f"{kind}-done" for kind in _COLLECTIVES),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """An array, or one of a tuple: its size, and whether it is in the device's main memory or on the chip."""

    bytes: int
    main: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a compiled program."""

    name: str
    opcode: str
    parts: tuple[Part, ...]
    operands: tuple[str, ...]
    rest: str

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        return [name for found in _CALLED.findall(self.rest) for name in _NAME.findall(found)]

    @property
    def main_bytes(self) -> int:
        """The bytes of its result that are in main memory."""
        return sum(part.bytes for part in self.parts if part.main)


class Program:
    """The text of a compiled program, taken apart.

    **Arguments:**

    - `text`: what `jax.stages.Compiled.as_text` gives.
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
                instruction = _read(line)
                current[instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    self._roots[name] = instruction

    def loop_body(self) -> str:
        """The body of the only loop of the entry computation."""
        loops = [one for one in self._computations[self.entry].values() if one.opcode == "while"]
        (loop,) = loops
        return re.findall(r"body=%([\w.\-]+)", loop.rest)[0]

    def traffic(self, computation: str) -> int:
        """The bytes that one run of a computation reads from main memory and writes to it.

        Of an array that is only sliced or looked up in, the parts that are taken count; of one that is updated in
        place, the update. A loop inside counts as often as it says that it runs, or once.
        """
        scope = self._computations[computation]
        return sum(self._moved(one, scope) for one in scope.values() if one.opcode != "while") + sum(
            self._trips(one) * self.traffic(body)
            for one in scope.values()
            if one.opcode == "while"
            for body in re.findall(r"body=%([\w.\-]+)", one.rest)
        )

    def exchanges(self, computation: str) -> list[Exchange]:
        """What one run of a computation exchanges between devices, equal operations put together."""
        totals: dict[tuple[str, int], tuple[int, int]] = {}
        for kind, devices, size, times in self._collectives(computation, 1):
            count, total = totals.get((kind, devices), (0, 0))
            totals[kind, devices] = count + times, total + times * size
        return [Exchange(kind, devices, count, total) for (kind, devices), (count, total) in totals.items()]

    def _collectives(self, computation: str, times: int) -> Iterator[tuple[str, int, int, int]]:
        scope = self._computations[computation]
        for one in scope.values():
            kind = one.opcode.removesuffix("-start")
            if one.opcode == "fusion" and "calls=%all-reduce-scatter" in one.rest:
                # So a TPU's compiler writes a reduce-scatter.
                inside = self._computations[one.called[0]].values()
                (devices,) = [_group(inner.rest) for inner in inside if inner.opcode == "all-reduce"]
                size = sum(part.bytes for part in scope[one.operands[0]].parts)
                yield "reduce_scatter", devices, size, times
            elif kind in _COLLECTIVES:
                devices = _group(one.rest)
                size = sum(sum(part.bytes for part in scope[name].parts) for name in one.operands)
                if devices != 1:
                    yield kind.replace("-", "_"), devices, size, times
            else:
                repeated = times * self._trips(one) if one.opcode == "while" else times
                for called in one.called:
                    yield from self._collectives(called, repeated)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop turns: as often as it says, or as its condition counts up to a constant; or once."""
        found = _TRIPS.search(loop.rest)
        if found is not None:
            return int(found[1])
        (name,) = _CONDITION.findall(loop.rest)
        scope, root = self._computations[name], self._roots[name]
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return 1
        limit = scope[root.operands[1]]
        return int(limit.rest) if limit.opcode == "constant" else 1

    def _moved(self, one: Instruction, scope: dict[str, Instruction]) -> int:
        if one.opcode in _MOVE_NOTHING:
            return 0
        sources = [scope[name] for name in one.operands]
        match one.opcode:
            case "call" | "conditional" | "async-start":
                return sum(self.traffic(called) for called in one.called)
            case "copy-start":
                return sum(part.bytes for part in one.parts[:2] if part.main)
            case "slice-start" | "dynamic-slice-start":
                source, taken = one.parts[:2]
                return taken.bytes * (source.main + taken.main)
            case "dynamic-update-slice":
                return sources[1].parts[0].bytes * one.parts[0].main + sources[1].main_bytes
            case "dynamic-slice" | "slice" | "gather":
                return one.parts[0].bytes * (sources[0].parts[0].main + one.parts[0].main)
            case "fusion":
                return self._moved_by_fusion(one, sources)
        if one.opcode.removesuffix("-start") in _COLLECTIVES:
            return 2 * sum(source.main_bytes for source in sources)
        return one.main_bytes + sum(source.main_bytes for source in sources)

    def _moved_by_fusion(self, one: Instruction, sources: list[Instruction]) -> int:
        (name,) = one.called[:1]
        inside, root = self._computations[name], self._roots[name]
        parameters = {
            int(re.findall(r"\d+", line.rest)[0]): line for line in inside.values() if line.opcode == "parameter"
        }
        read = sum(_read_of(parameters[at], inside) for at, source in enumerate(sources) if source.parts[0].main)
        results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written = sum(_written_of(line, inside) for line, part in zip(results, one.parts, strict=False) if part.main)
        return read + written


def _read(line: str) -> Instruction:
    name, _, definition = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(definition, 0) if definition.startswith("(") else definition.index(" ")
    shape, definition = definition[:end], definition[end:].lstrip()
    opcode, _, _ = definition.partition("(")
    start = len(opcode)
    stop = _closing(definition, start)
    operands = definition[start:stop]
    # The number of a parameter, and the value of a constant, stand where others have their operands.
    rest = operands[1:-1] if opcode in ("parameter", "constant") else definition[stop:]
    return Instruction(name.lstrip("%"), opcode, _parts(shape), tuple(_NAME.findall(operands)), rest)


def _closing(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _parts(shape: str) -> tuple[Part, ...]:
    return tuple(
        Part(math.ceil(_width(dtype) / 8 * math.prod(map(int, filter(None, sizes.split(","))))), "S(" not in layout)
        for dtype, sizes, layout in _LEAF.findall(shape)
    )


def _width(dtype: str) -> int:
    """The bits of one number."""
    found = _BITS.match(dtype)
    return int(found[1]) if found is not None else 8 if dtype == "pred" else 0


def _group(rest: str) -> int:
    """How many devices take part in one exchange; 0 if the text does not tell."""
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


def _read_of(parameter: Instruction, inside: dict[str, Instruction]) -> int:
    """The bytes that a fusion reads of one of its operands."""
    total = 0
    for use in _uses(parameter, inside):
        if use.opcode in ("dynamic-slice", "slice", "gather"):
            total += use.parts[0].bytes
        elif use.opcode != "dynamic-update-slice" or parameter.name not in _behind(use.operands[:1], inside):
            return parameter.parts[0].bytes
    return min(total, parameter.parts[0].bytes)


def _uses(line: Instruction, inside: dict[str, Instruction]) -> Iterator[Instruction]:
    for use in inside.values():
        if line.name in use.operands:
            if use.opcode == "bitcast":
                yield from _uses(use, inside)
            else:
                yield use


def _behind(names: tuple[str, ...], inside: dict[str, Instruction]) -> set[str]:
    """These, and what they are other names of."""
    found = set(names)
    for name in names:
        if inside[name].opcode == "bitcast":
            found |= _behind(inside[name].operands, inside)
    return found


def _written_of(result: Instruction, inside: dict[str, Instruction]) -> int:
    """The bytes that a fusion writes of one of its results."""
    while result.opcode == "bitcast":
        result = inside[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return inside[result.operands[1]].parts[0].bytes
    return sum(part.bytes for part in result.parts)
