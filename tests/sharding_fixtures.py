"""How a module is run in `shard_map` on some of the virtual devices, and what it exchanges there."""

import re

import equinox as eqx
import jax
from jax.sharding import PartitionSpec

from mistral_eqx.nn import Linear
from mistral_eqx.parallel import Strategy


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "collective_permute")


def mesh(devices, axis="tp"):
    return jax.make_mesh((devices,), (axis,), devices=jax.devices()[:devices])


def with_strategy(module, strategy):
    """The module with another strategy everywhere."""
    return jax.tree.map(
        lambda leaf: strategy if isinstance(leaf, Strategy) else leaf,
        module,
        is_leaf=lambda leaf: isinstance(leaf, Strategy),
    )


def specs(module):
    """How each array of a module is split; one that no strategy speaks of is on every device."""

    def of(node):
        if not isinstance(node, Linear):
            return PartitionSpec() if eqx.is_array(node) else None
        dims = node.weight.dims(node.in_dims, node.out_dims)
        split = eqx.tree_at(
            lambda linear: [getattr(linear.weight, field) for field in dims],
            node,
            [node.strategy.spec(names) for names in dims.values()],
        )
        return jax.tree.map(lambda leaf: leaf if _is_spec(leaf) else None, split, is_leaf=_is_spec)

    return jax.tree.map(of, module, is_leaf=lambda node: isinstance(node, Linear))


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
