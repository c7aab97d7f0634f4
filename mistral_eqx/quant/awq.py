"""AWQ: inputs with large activations get larger weights, so that rounding changes them less."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..nn import AbstractWeight
from .calibration import AbstractCalibratedScheme, Inputs
from .integers import from_codes, round_to_codes
from .schemes import RTN, Layer, expect_groups, expect_whole_blocks


# The exponents that are tried.
_RATIOS = np.linspace(0, 1, 20, endpoint=False)
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
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True

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
        return self._rounding.weight(numbers, layer)

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
    change = found - numbers
    return jnp.sum(jnp.matmul(change, hessian, precision=lax.Precision.HIGHEST) * change)
