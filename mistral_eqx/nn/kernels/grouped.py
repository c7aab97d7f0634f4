"""Products of groups of rows with one weight for each group."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from ...parallel import vary_alike
from ..precision import at_least_float32
from .dense import contract_cpu


# A larger block computes more rows that are thrown away, a smaller one copies weights more often.
_LARGEST_BLOCK = 128


@jax.custom_jvp
def contract_grouped(
    weights: Float[Array, "experts out in"], x: Float[Array, "rows in"], sizes: Int[Array, "experts"]
) -> Float[Array, "rows out"]:
    """The product of each row with the weight of its group; sums are float32 or wider.

    Only weights of groups that have rows are read.

    **Arguments:**

    - `weights`: the weight of each group, stored `(out, in)`.
    - `x`: the rows, group after group.
    - `sizes`: the number of rows of each group. Results of rows after the last group are arbitrary.
    """
    return lax.platform_dependent(weights, x, sizes, cpu=_grouped_cpu, default=_grouped)


def _grouped_jvp(primals, tangents):
    # As for `contract`: gradients of a bilinear map need only `weights` and `x`.
    (weights, x, sizes), (d_weights, d_x, _) = primals, tangents
    terms = [
        _ragged(one, other, sizes)
        for one, other in ((d_weights, x), (weights, d_x))
        if not isinstance(one, SymbolicZero) and not isinstance(other, SymbolicZero)
    ]
    return contract_grouped(weights, x, sizes), sum(terms[1:], start=terms[0])


contract_grouped.defjvp(_grouped_jvp, symbolic_zeros=True)


def _grouped(weights: Array, x: Array, sizes: Array) -> Array:
    if len(x) > len(weights):
        return _ragged(weights, x, sizes)
    # Fewer rows than weights, as in decoding: each row has its own copy of the weight that it needs.
    group = jnp.sum(jnp.arange(len(x), dtype=sizes.dtype)[:, None] >= jnp.cumsum(sizes)[None], axis=1)
    own = weights[jnp.minimum(group, len(weights) - 1)]
    return lax.dot_general(own, x, (((2,), (1,)), ((0,), (0,))), preferred_element_type=at_least_float32(x.dtype))


def _ragged(weights: Array, x: Array, sizes: Array) -> Array:
    numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
    return lax.ragged_dot_general(x, weights, sizes, numbers, preferred_element_type=at_least_float32(x.dtype))


def _grouped_cpu(weights: Array, x: Array, sizes: Array) -> Array:
    # XLA on CPU computes a ragged product with all weights. This loop takes a block of one group's rows in each step.
    # A block that exceeds its group writes rows of the next one, which the next steps overwrite.
    rows, block = len(x), min(_LARGEST_BLOCK, 1 << (-(-len(x) // len(weights)) - 1).bit_length())
    blocks, starts = -(-sizes // block), jnp.cumsum(sizes) - sizes
    stops = jnp.cumsum(blocks)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def step(number: Array, y: Array) -> Array:
        group = jnp.sum(stops <= number, dtype=sizes.dtype)
        first = starts[group] + (number - stops[group] + blocks[group]) * block
        own = lax.dynamic_slice_in_dim(padded, first, block)
        part = contract_cpu(lax.dynamic_index_in_dim(weights, group, keepdims=False), own[None], 1)
        return lax.dynamic_update_slice_in_dim(y, part[0], first, 0)

    empty = jnp.zeros((rows + block, weights.shape[1]), at_least_float32(x.dtype))
    empty, *_ = vary_alike(empty, weights, x, sizes)
    return lax.fori_loop(0, stops[-1], step, empty)[:rows]
