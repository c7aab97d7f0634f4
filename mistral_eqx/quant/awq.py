"""AWQ: inputs with large activations get larger weights, so that rounding changes them less."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from ..nn import AbstractWeight
from .calibration import AbstractCalibratedScheme, Inputs
from .integers import from_codes, integer_blocks, round_to_codes
from .schemes import RTN, Layer, expect_groups, expect_whole_blocks, in_blocks


# The exponents that are tried, and the parts of a group's largest number at which numbers are clipped.
_RATIOS = np.linspace(0, 1, 20, endpoint=False)
_CLIPPED = np.linspace(1, 0.5, 10, endpoint=False)
# The error of a score is in the product of both, and not in their outputs alone.
_OF_SCORES = ("q_proj", "k_proj")
_LEAST = np.float32(1e-4)


@dataclasses.dataclass(frozen=True)
class AWQ(AbstractCalibratedScheme):
    """Whole numbers of few bits in groups, rounded to the nearest after columns are scaled by their inputs' magnitudes
    ([Lin et al., 2023](https://arxiv.org/abs/2306.00978)).

    The scale is a power of the magnitude. Of 20 exponents from 0 (no scale) to 0.95, that with the least error of the
    layers' outputs is taken. What produces the inputs is divided by it: a norm, or rows of `v_proj` and `up_proj`.

    **Attributes:**

    - `bits`: of a number, 2 to 8.
    - `group_size`: how many inputs share a scale.
    - `zero_point`: whether codes span the numbers from the least to the largest.
    - `clip`: whether large numbers of a group are clipped where this lowers the error of the layer's output. Of 10
        limits for each group, from its largest number to 0.55 of it, that with the least error of the group's part of
        the output is taken. Queries and keys are not clipped, as in the authors' code.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    clip: bool = False

    def __post_init__(self):
        expect_groups("AWQ", self.bits, self.group_size)

    def factors(self, numbers: Mapping[str, np.ndarray], inputs: Inputs) -> np.ndarray:
        for path, own in numbers.items():
            expect_whole_blocks(path, own.shape[1], self._rounding.block)
        hessian = jnp.asarray(inputs.hessian)
        weights = [jnp.asarray(own) for own in numbers.values()]
        error = functools.partial(_error, bits=self.bits, group_size=self.group_size, zero_point=self.zero_point)
        tried = [_normalised(inputs.magnitude**ratio) for ratio in _RATIOS.astype(np.float32)]
        errors = [sum(float(error(own, jnp.asarray(factors), hessian)) for own in weights) for factors in tried]
        return tried[int(np.argmin(errors))]

    def weight(self, numbers: np.ndarray, layer: Layer, inputs: Inputs) -> AbstractWeight:
        if not self.clip or layer.path.endswith(_OF_SCORES):
            return self._rounding.weight(numbers, layer)

        def blocks(grouped: np.ndarray) -> np.ndarray:
            flat = jnp.asarray(grouped.reshape(-1, len(inputs.hessian)))
            found = _clipped(
                flat,
                jnp.asarray(inputs.hessian),
                bits=self.bits,
                group_size=self.group_size,
                zero_point=self.zero_point,
            )
            codes, scale, zero = (np.asarray(each).reshape(*grouped.shape[:-1], -1) for each in found)
            return integer_blocks(codes, scale, zero, bits=self.bits)

        return in_blocks(self._rounding.block, numbers, layer, blocks)

    @property
    def _rounding(self) -> RTN:
        return RTN(self.bits, self.group_size, self.zero_point)


def _normalised(powers: np.ndarray) -> np.ndarray:
    """Factors of which the least and the largest are inverse to each other."""
    powers = np.maximum(powers, _LEAST)
    return powers / np.sqrt(powers.max() * powers.min())


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "zero_point"))
def _error(
    numbers: Float[Array, "rows inputs"],
    factors: Float[Array, " inputs"],
    hessian: Float[Array, "inputs inputs"],
    *,
    bits: int,
    group_size: int,
    zero_point: bool,
) -> Float[Array, ""]:
    """Twice the mean squared error of a layer's output, its rows summed up."""
    scaled = (numbers * factors[None]).reshape(len(numbers), -1, group_size)
    found = from_codes(*round_to_codes(scaled, bits, zero_point=zero_point)).reshape(numbers.shape) / factors[None]
    return jnp.sum(_errors_of_rows(found - numbers, hessian))


def _errors_of_rows(
    change: Float[Array, "rows inputs"], hessian: Float[Array, "inputs inputs"]
) -> Float[Array, " rows"]:
    return jnp.sum(jnp.matmul(change, hessian, precision=lax.Precision.HIGHEST) * change, axis=1)


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "zero_point"))
def _clipped(
    numbers: Float[Array, "rows inputs"],
    hessian: Float[Array, "inputs inputs"],
    *,
    bits: int,
    group_size: int,
    zero_point: bool,
) -> tuple[UInt8[Array, "rows groups size"], Float[Array, "rows groups 1"], UInt8[Array, "rows groups 1"]]:
    """Codes, scales and zeros, with a limit for each group; a row that has more error than without stays as it was."""
    groups = numbers.reshape(len(numbers), -1, group_size)
    count = groups.shape[1]
    largest = jnp.max(jnp.abs(groups), axis=2, keepdims=True)
    # Each group's own inputs, on the diagonal of the Hessian.
    own = hessian.reshape(count, group_size, count, group_size)[jnp.arange(count), :, jnp.arange(count)]

    def tried(part: Array) -> tuple[tuple[Array, Array, Array], Array]:
        found = round_to_codes(jnp.clip(groups, -part * largest, part * largest), bits, zero_point=zero_point)
        change = from_codes(*found) - groups
        products = jnp.einsum("rgi,gij->rgj", change, own, precision=lax.Precision.HIGHEST)
        return found, jnp.sum(products * change, axis=2, keepdims=True)

    def step(best: tuple[tuple[Array, Array, Array], Array], part: Array):
        return _better(tried(part), best), None

    whole = tried(jnp.float32(1))
    (found, _), _ = lax.scan(step, whole, jnp.asarray(_CLIPPED[1:], jnp.float32))
    errors = [
        _errors_of_rows((from_codes(*each) - groups).reshape(numbers.shape), hessian)[:, None, None]
        for each in (found, whole[0])
    ]
    return _better((found, errors[0]), (whole[0], errors[1]))[0]


def _better(new: tuple[Any, Array], old: tuple[Any, Array]) -> tuple[Any, Array]:
    """Where its error is less, the new one."""
    return jax.tree.map(lambda one, other: jnp.where(new[1] < old[1], one, other), new, old)
