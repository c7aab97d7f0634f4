"""What a program exchanges and multiplies as it was written, before XLA compiles it.

A loop whose turns are counted by a constant counts as often as it turns; any other, such as the decoding loop, once.
Of a conditional that exchanges something, the branch that sends fewer bytes counts: the other one is for tokens that do
not fit into a buffer.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.mlir.dialects import sdy, stablehlo

from .limits import sent_share
from .report import Exchange


_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute")


def written(lowered: jax.stages.Lowered) -> list[Exchange]:
    """What a program exchanges between devices, equal operations put together."""
    totals: dict[tuple[str, int], tuple[int, int]] = {}
    symbols = _symbols(lowered)
    for operation, times in _operations(symbols):
        kind = operation.name.removeprefix("stablehlo.")
        if kind not in _COLLECTIVES:
            continue
        devices, size = _group(operation, symbols), sum(_bytes(operand.type) for operand in operation.operands)
        if devices > 1:
            count, total = totals.get((kind, devices), (0, 0))
            totals[kind, devices] = count + times, total + times * size
    return [Exchange(kind, devices, count, total) for (kind, devices), (count, total) in totals.items()]


def products(lowered: jax.stages.Lowered) -> float:
    """The multiplications and additions of all products of arrays on one device."""
    total = 0
    for operation, times in _operations(_symbols(lowered)):
        if operation.name == "stablehlo.dot_general":
            sizes = operation.operands[0].type.shape
            summed = stablehlo.DotDimensionNumbers(
                operation.attributes["dot_dimension_numbers"]
            ).lhs_contracting_dimensions
            terms = math.prod(sizes[dimension] for dimension in summed)
            total += times * 2 * terms * math.prod(operation.results[0].type.shape)
    return float(total)


def group_size(groups: Any, symbols: dict[str, Any]) -> int:
    """How many devices exchange with each other.

    `groups` is the attribute `replica_groups`: a table with one row of device ids per group or, from JAX 0.11 on, the
    axes of a mesh. `symbols` are the named operations of the module, among them its meshes.
    """
    if not stablehlo.ReplicaGroupMeshAxesAttr.isinstance(groups):
        return groups.type.shape[1]
    groups = stablehlo.ReplicaGroupMeshAxesAttr(groups)
    mesh = sdy.MeshAttr(symbols[groups.mesh.value].attributes["mesh"])
    sizes = {axis.name: axis.size for axis in map(sdy.MeshAxisAttr, mesh.axes)}
    return math.prod(sizes[stablehlo.AxisRefAttr(axis).name] for axis in groups.axes)


def _symbols(lowered: jax.stages.Lowered) -> dict[str, Any]:
    """The module's functions and meshes by name."""
    module: Any = lowered.compiler_ir("stablehlo")
    return {one.attributes["sym_name"].value: one.operation for one in module.body.operations}


def _operations(symbols: dict[str, Any]) -> Iterator[tuple[Any, int]]:
    """Each operation, and how often it runs."""

    def inside(operation: Any, times: int) -> Iterator[tuple[Any, int]]:
        found = [
            [pair for block in region for one in block for pair in visit(one.operation, times)]
            for region in operation.regions
        ]
        if operation.name in ("stablehlo.case", "stablehlo.if"):
            sizes = [sum(turns * _sent(one, symbols) for one, turns in branch) for branch in found]
            found = [found[sizes.index(min(sizes))]] if any(sizes) else found
        for branch in found:
            yield from branch

    def visit(operation: Any, times: int) -> Iterator[tuple[Any, int]]:
        yield operation, times
        if operation.name in ("func.call", "call"):
            yield from inside(symbols[operation.attributes["callee"].value], times)
        else:
            yield from inside(operation, times * (_turns(operation) if operation.name == "stablehlo.while" else 1))

    return inside(symbols["main"], 1)


def _turns(loop: Any) -> int:
    """How often a loop turns that counts from 0 up to a constant; 1 if it does not."""
    (condition,) = loop.regions[0]
    *_, compared, _ = condition
    if compared.operation.name != "stablehlo.compare":
        return 1
    limit = compared.operation.operands[1]
    if getattr(limit.owner, "name", None) != "stablehlo.constant" or not str(limit.type.element_type).startswith("i"):
        return 1
    return limit.owner.attributes["value"].get_splat_value().value


def _group(operation: Any, symbols: dict[str, Any]) -> int:
    is_pair = operation.name == "stablehlo.collective_permute"
    return 2 if is_pair else group_size(operation.attributes["replica_groups"], symbols)


def _sent(operation: Any, symbols: dict[str, Any]) -> float:
    """The bytes that one device sends in an operation; 0 if it is not an exchange."""
    kind = operation.name.removeprefix("stablehlo.")
    if kind not in _COLLECTIVES:
        return 0.0
    size = sum(_bytes(operand.type) for operand in operation.operands)
    return sent_share(kind, _group(operation, symbols)) * size


def _bytes(kind: Any) -> int:
    width = str(kind.element_type).lstrip("bfui")
    return math.prod(kind.shape) * max(1, int(width) // 8)
