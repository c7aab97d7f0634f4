"""Products of groups of rows with one weight for each group."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from ...parallel import kernel, vary_alike
from ..precision import at_least_float32, from_bits, to_bits
from . import native
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
    # The mean size of a group decides, because the compiler does not know the sizes.
    slow = native.has_slow_products(weights.dtype) and len(x) > native.FEW * len(weights)
    if native.instructions() is None or slow or x.dtype.itemsize == 8:
        return lax.platform_dependent(weights, x, sizes, cpu=_grouped_cpu, default=_grouped)
    by_kernel = kernel(partial(lax.platform_dependent, cpu=_grouped_native, default=_grouped))
    return by_kernel(*vary_alike(weights, x, sizes))


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
    own = weights[group_of_rows(sizes, len(x))]
    return lax.dot_general(own, x, (((2,), (1,)), ((0,), (0,))), preferred_element_type=at_least_float32(x.dtype))


def _ragged(weights: Array, x: Array, sizes: Array) -> Array:
    numbers = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
    return lax.ragged_dot_general(x, weights, sizes, numbers, preferred_element_type=at_least_float32(x.dtype))


def _grouped_native(weights: Array, x: Array, sizes: Array) -> Array:
    return native.grouped_dense(x.astype(jnp.float32), sizes, weights)


def _grouped_cpu(weights: Array, x: Array, sizes: Array) -> Array:
    # XLA on CPU computes a ragged product with all weights.
    def own(group: Array) -> Array:
        if weights.dtype.itemsize != 2:
            return lax.dynamic_index_in_dim(weights, group, keepdims=False)
        # XLA on CPU has no slices of bfloat16: it would convert all weights. The barrier is that of `rows`.
        kept, group = lax.optimization_barrier((weights, group))
        return from_bits(lax.dynamic_index_in_dim(to_bits(kept), group, keepdims=False), weights.dtype)

    return contract_by_groups(own, weights.shape[1], x, sizes, weights)


def group_of_rows(sizes: Int[Array, "groups"], rows: int) -> Int[Array, "rows"]:
    """The group of each row; rows after the last group get the last one."""
    group = jnp.sum(jnp.arange(rows, dtype=sizes.dtype)[:, None] >= jnp.cumsum(sizes)[None], axis=1)
    return jnp.minimum(group, len(sizes) - 1)


def contract_by_groups(weight: Callable[[Array], Array], outputs: int, x: Array, sizes: Array, *arrays: Array) -> Array:
    """The product of each row with the weight of its group, of which one is made at a time.

    **Arguments:**

    - `weight`: from the index of a group to its weight, shape `(outputs, in)`.
    - `outputs`: of a weight.
    - `x`, `sizes`: as for `contract_grouped`.
    - `arrays`: what `weight` is made of.
    """
    # Each step takes a block of one group's rows. A block that exceeds its group writes rows of the next one, which the
    # next steps overwrite.
    rows, block = len(x), min(_LARGEST_BLOCK, 1 << (-(-len(x) // len(sizes)) - 1).bit_length())
    blocks, starts = -(-sizes // block), jnp.cumsum(sizes) - sizes
    stops = jnp.cumsum(blocks)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def step(number: Array, y: Array) -> Array:
        group = jnp.sum(stops <= number, dtype=sizes.dtype)
        first = starts[group] + (number - stops[group] + blocks[group]) * block
        own = lax.dynamic_slice_in_dim(padded, first, block)
        part = contract_cpu(weight(group), own[None], 1)
        return lax.dynamic_update_slice_in_dim(y, part[0], first, 0)

    empty = jnp.zeros((rows + block, outputs), at_least_float32(x.dtype))
    empty, *_ = vary_alike(empty, x, sizes, *arrays)
    return lax.fori_loop(0, stops[-1], step, empty)[:rows]
