"""GPTQ: each column is rounded in turn, and those that follow make up for its error."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from ..checks import Positive, checked
from ..nn import AbstractWeight
from .calibration import AbstractCalibratedScheme, Inputs
from .integers import from_codes, grid, integer_blocks, nearest
from .ordered import OrderedWeight
from .schemes import Layer, expect_groups, in_blocks


# At most so many columns are rounded before the others are updated.
_BATCH = 128


@dataclasses.dataclass(frozen=True)
class GPTQ(AbstractCalibratedScheme):
    """Whole numbers of few bits in groups, each rounded to make up for the errors of those before it
    ([Frantar et al., 2022](https://arxiv.org/abs/2210.17323)).

    **Attributes:**

    - `bits`: of a number, 2 to 8.
    - `group_size`: how many inputs share a scale. It follows from the numbers as they are when the group is reached.
    - `zero_point`: whether codes span the numbers from the least to the largest.
    - `act_order`: whether inputs are rounded in the order of their mean squares, the largest first (`desc_act`). Groups
        are of inputs in this order, so that no strategy can split them ([`mistral_eqx.quant.OrderedWeight`][]).
    - `damping`: what is added to the diagonal of the Hessian, as a share of its mean.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    act_order: bool = False
    damping: float = 0.01

    def __post_init__(self):
        expect_groups("GPTQ", self.bits, self.group_size)
        checked(self.damping, Positive, "damping")

    def weight(self, numbers: np.ndarray, layer: Layer, inputs: Inputs) -> AbstractWeight:
        mean_squares = np.diagonal(inputs.hessian)
        # Without activations an input has no error; its numbers become 0.
        dead = mean_squares == 0
        hessian = inputs.hessian + np.diag(dead.astype(np.float32))
        count = len(dead)
        order = np.argsort(-mean_squares, kind="stable") if self.act_order else np.arange(count)
        group = np.argsort(order) // self.group_size
        # Within its group, the order in which an input was rounded no longer matters.
        by_group = np.argsort(group, kind="stable")

        def blocks(grouped: np.ndarray) -> np.ndarray:
            flat = np.where(dead, 0, grouped.reshape(-1, count)).astype(np.float32)
            factor = inverse_factor(hessian[np.ix_(order, order)], self.damping)
            codes, scale, zero = rounded(
                jnp.asarray(flat[:, order]),
                factor,
                bits=self.bits,
                group_size=self.group_size,
                zero_point=self.zero_point,
                batch=math.gcd(self.group_size, _BATCH) if self.group_size > _BATCH else self.group_size,
            )
            codes = np.asarray(codes)[:, np.argsort(order)][:, by_group]
            one = (*grouped.shape[:-1], 1)
            return integer_blocks(
                codes.reshape(grouped.shape), np.asarray(scale).reshape(one), np.asarray(zero).reshape(one), self.bits
            )

        base = in_blocks(f"INT{self.bits}/{self.group_size}", numbers, layer, blocks, one_axis=self.act_order)
        if not self.act_order:
            return base
        inverse = np.argsort(by_group)
        return OrderedWeight(base, jnp.asarray(by_group, jnp.int32), jnp.asarray(inverse, jnp.int32))


def inverse_factor(hessian: np.ndarray, damping: float) -> Float[Array, "inputs inputs"]:
    """The upper triangular `U` with `hessian⁻¹ = Uᵀ U`.

    Row `i` of `U`, divided by its diagonal entry, has the updates of the columns from `i` on for an error of 1 in
    column `i`, when those before are fixed.

    **Arguments:**

    - `hessian`: symmetric and positive semidefinite, shape `(inputs, inputs)`.
    - `damping`: what is added to its diagonal, as a share of the diagonal's mean.
    """
    damped = hessian.astype(np.float64)
    np.fill_diagonal(damped, damped.diagonal() + damping * damped.diagonal().mean())
    # Backwards, the Cholesky factor is upper triangular: the Hessian is R Rᵀ, and U is the inverse of R.
    root = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    root = jnp.asarray(root.astype(np.float32))
    return jax.scipy.linalg.solve_triangular(root, jnp.eye(len(hessian), dtype=jnp.float32))


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "zero_point", "batch"))
def rounded(
    numbers: Float[Array, "rows inputs"],
    factor: Float[Array, "inputs inputs"],
    *,
    bits: int,
    group_size: int,
    zero_point: bool,
    batch: int,
) -> tuple[UInt8[Array, "rows inputs"], Float[Array, "rows groups"], Float[Array, "rows groups"]]:
    """Rounds the columns of a weight, one after the other.

    **Arguments:**

    - `numbers`: the weight.
    - `factor`: what `inverse_factor` returned.
    - `bits`, `group_size`, `zero_point`: as in [`mistral_eqx.GPTQ`][].
    - `batch`: how many columns are rounded before those after them are updated; it divides `group_size`.

    **Returns:** codes, and the scale and the zero of each group.
    """

    def of_batch(carry: tuple[Array, Array, Array], start: Array):
        columns, scale, zero = carry
        reached = grid(lax.dynamic_slice_in_dim(columns, start, group_size).T, bits, zero_point=zero_point)
        scale, zero = (
            jnp.where(start % group_size == 0, new[:, 0], old) for new, old in zip(reached, (scale, zero), strict=True)
        )
        updates = lax.dynamic_slice_in_dim(factor, start, batch)

        def of_column(own: Array, at: tuple[Array, Array]):
            index, update = at
            codes = nearest(own[index], scale, zero, bits, zero_point=zero_point)
            error = (own[index] - from_codes(codes, scale, zero)) / update[index]
            return own - update[:, None] * error[None, :], (codes, error)

        own = lax.dynamic_slice_in_dim(columns, start, batch)
        among = lax.dynamic_slice_in_dim(updates, start, batch, axis=1)
        _, (codes, errors) = lax.scan(of_column, own, (jnp.arange(batch), among))
        # Columns before these change too, which nothing reads any more.
        columns = columns - jnp.matmul(updates.T, errors, precision=lax.Precision.HIGHEST)
        return (columns, scale, zero), (codes, scale, zero)

    # A column of the weight is a row here, and lies in one piece of memory.
    rows, inputs = numbers.shape
    none = jnp.zeros(rows, jnp.float32)
    _, (codes, *shared) = lax.scan(of_batch, (numbers.T, none, none), jnp.arange(0, inputs, batch))
    scale, zero = (each[:: group_size // batch].T for each in shared)
    return codes.reshape(inputs, rows).T, scale, zero
