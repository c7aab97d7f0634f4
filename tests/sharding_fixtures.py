"""How a module is run in `shard_map` on some of the virtual devices, and what programs exchange there."""

import collections
import math
import re

import equinox as eqx
import jax
from jax.sharding import AbstractMesh, PartitionSpec

from mistral_eqx.parallel import Strategy
from mistral_eqx.planning.stablehlo import group_size


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute")


def mesh(devices, axis="tp"):
    return jax.make_mesh((devices,), (axis,), devices=jax.devices()[:devices])


def sharded(function, mesh, arguments, in_specs, out_specs):
    """`function(*arguments)` inside `shard_map`, its arguments placed on the devices before.

    **Returns:** the result, and how many of each collective there are in the program before XLA sees it.
    """
    arrays, static = eqx.partition(arguments, eqx.is_array)
    placed = jax.tree.map(
        lambda spec, part: jax.device_put(part, jax.NamedSharding(mesh, spec)),
        in_specs,
        arrays,
        is_leaf=_is_spec,
    )
    program = jax.jit(
        jax.shard_map(
            lambda arrays: function(*eqx.combine(arrays, static)),
            mesh=mesh,
            in_specs=(in_specs,),
            out_specs=out_specs,
            check_vma=True,
        )
    )
    text = program.lower(placed).as_text()
    counts = {name: len(re.findall(rf"stablehlo\.{name}\b", text)) for name in COLLECTIVES}
    return program(placed), {name: count for name, count in counts.items() if count}


def _is_spec(node):
    return isinstance(node, PartitionSpec)


def exchanges(lowered):
    """What a lowered program exchanges, in StableHLO, before XLA sees it.

    A loop whose turns are counted by a constant counts as often as it turns; any other, such as the decoding loop,
    once.

    **Returns:** a counter over `(kind, bytes of the operand, devices in a group)`; groups of one exchange nothing.
    """
    module = getattr(lowered, "lowered", lowered).compiler_ir("stablehlo")
    symbols = {op.attributes["sym_name"].value: op.operation for op in module.body.operations}
    found = collections.Counter()

    def visit(op, times):
        kind = op.name.removeprefix("stablehlo.")
        if kind in COLLECTIVES:
            devices = group_size(op.attributes["replica_groups"], symbols)
            for operand in op.operands:
                if devices > 1:
                    found[kind, _nbytes(operand.type), devices] += times
        elif op.name in ("func.call", "call"):
            visit_regions(symbols[op.attributes["callee"].value], times)
            return
        visit_regions(op, times * (_turns(op) if kind == "while" else 1))

    def visit_regions(op, times):
        for region in op.regions:
            for block in region:
                for inner in block:
                    visit(inner.operation, times)

    visit_regions(symbols["main"], 1)
    return found


def _turns(loop):
    """How often a loop turns that counts from 0 up to a constant; 1 if it does not."""
    (condition,) = loop.regions[0]
    *_, compared, _ = condition
    if compared.operation.name != "stablehlo.compare":
        return 1
    limit = compared.operation.operands[1].owner
    if getattr(limit, "name", None) != "stablehlo.constant":
        return 1
    return limit.attributes["value"].get_splat_value().value


def _nbytes(type_):
    bits = {"i1": 8, "bf16": 16}.get(str(type_.element_type)) or int(str(type_.element_type).lstrip("bfiu"))
    return math.prod(type_.shape) * bits // 8


def written(text):
    """What a compiled program writes to memory: the operation, the number of entries, and the line of each array.

    What happens inside a fused loop is not written; the fusion is called what the last operation in it is.
    """
    computations, lines = {}, None
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations[opened[1]] = []
        elif lines is not None:
            lines.append(line)
    fused = {
        name for line in text.splitlines() if " fusion(" in line for name in re.findall(r"calls=%?([\w.-]+)", line)
    }
    for name, lines in computations.items():
        for line in lines if name not in fused else []:
            if not (match := _RESULT.match(line)):
                continue
            dims, operation = match.groups()
            if operation == "fusion":
                inside = computations[re.search(r"calls=%?([\w.-]+)", line)[1]]
                operation = next(_RESULT.match(one)[2] for one in inside if one.lstrip().startswith("ROOT"))
            yield operation, math.prod(map(int, filter(None, dims.split(",")))), line


_RESULT = re.compile(r"\s*(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(")


# Meshes of 2 to 8 devices, with up to three axes, some of which hold one device only.
MESHES = [
    {"a": 2},
    {"a": 3},
    {"a": 4},
    {"a": 7},
    {"a": 8},
    {"a": 1, "b": 4},
    {"a": 2, "b": 2},
    {"a": 3, "b": 2},
    {"a": 2, "b": 3},
    {"a": 4, "b": 2},
    {"a": 2, "b": 4},
    {"a": 2, "b": 2, "c": 2},
    {"a": 2, "b": 1, "c": 4},
]
_DIMS = ("batch", "vocab", "embed", "hidden", "kv_heads", "q_per_kv", "head_dim", "kv_seq")


def free_strategy(random, config, axes, batch):
    """A strategy that no one has named: most dimensions, in any order, each with some of the axes, if it is legal."""
    abstract, strategy = AbstractMesh(tuple(axes.values()), tuple(axes)), Strategy()
    dims = random.sample(_DIMS, random.randint(5, len(_DIMS)))
    # `embed` shares an array with most others, so it comes first at times; `seq` comes last, since it needs others.
    for dim in [*random.choice([[], [], ["embed"]]), *dims, "tokens"]:
        names = random.sample(tuple(axes), random.randint(1, len(axes)))
        for length in range(len(names), 0, -1):
            longer = f"{strategy.layout} {dim}@{','.join(names[:length])}".strip()
            if _is_legal(longer, config, abstract, batch):
                strategy = Strategy(longer)
                break
    return strategy


def _is_legal(layout, config, mesh, batch):
    try:
        strategy = Strategy(layout)
        strategy.check(config, mesh)
    except ValueError:
        return False
    return batch % strategy.parts("batch", mesh) == 0
