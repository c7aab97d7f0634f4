"""How a module is run in `shard_map` on some of the virtual devices, and what it exchanges there."""

import re

import equinox as eqx
import jax
from jax.sharding import PartitionSpec


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
