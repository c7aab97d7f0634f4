"""The angles of the rotary embedding, and how they are scaled for long contexts."""

import abc
import dataclasses
import math
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le

from .checks import Count, check_fields
from .errors import InputError


# Published models have 1.5 to 128. A larger factor leaves float32's range with the lowest frequencies.
Factor = Annotated[float, Ge(1), Le(1e6)]
# Rotations within the original context; published models have 1 to 64.
Rotations = Annotated[float, Ge(1e-6), Le(1e6)]
# Published models have 1 to 2.
Magnitude = Annotated[float, Gt(0), Le(1e6)]


class AbstractRopeScaling(abc.ABC):
    """Changes the angles of the rotary embedding so that a model attends over contexts longer than its first training.

    To add a kind, subclass this as a frozen dataclass and define `scaled`. The files of checkpoints hold the kinds of
    this package only.
    """

    @abc.abstractmethod
    def scaled(self, inv_freq: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        """The scaled angles.

        **Arguments:**

        - `inv_freq`: the angle of each pair per position without scaling, in radians and float64, shape `(dim / 2,)`.
        - `theta`: the base of the wavelengths.

        **Returns:** an array like `inv_freq`, and the factor of all cosines and sines.
        """


@dataclasses.dataclass(frozen=True)
class LinearScaling(AbstractRopeScaling):
    """All angles divided by `factor`, as if positions were closer
    ([position interpolation](https://arxiv.org/abs/2306.15595)).
    """

    factor: Factor

    def __post_init__(self):
        check_fields(self, "The rope scaling's {}".format)

    def scaled(self, inv_freq: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        return inv_freq / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(AbstractRopeScaling):
    """Long wavelengths scaled, short ones kept, as in [Llama 3.1](https://arxiv.org/abs/2407.21783).

    **Attributes:**

    - `factor`: the divisor of angles whose wavelength exceeds `original_positions / low_freq_factor`.
    - `low_freq_factor`, `high_freq_factor`: a wavelength below `original_positions / high_freq_factor` is kept, and one
        between the two limits is interpolated.
    - `original_positions`: the longest context of the first training.

    **Raises:** `ValueError` if a field is outside its range, or `high_freq_factor` is not above `low_freq_factor`.
    """

    factor: Factor
    low_freq_factor: Rotations = 1.0
    high_freq_factor: Rotations = 4.0
    original_positions: Count = 8192

    def __post_init__(self):
        check_fields(self, "The rope scaling's {}".format)
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"The rope scaling's high_freq_factor is {self.high_freq_factor} and its low_freq_factor is "
                f"{self.low_freq_factor}, but the first must be above the second.",
                key="high_freq_factor",
            )

    def scaled(self, inv_freq: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        rotations = self.original_positions * inv_freq / (2 * math.pi)
        kept = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return inv_freq * (kept + (1 - kept) / self.factor), 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling(AbstractRopeScaling):
    """Pairs that rotate often in the original context kept, pairs that rotate rarely scaled, a linear ramp between
    them, and cosines and sines multiplied by a constant ([YaRN](https://arxiv.org/abs/2309.00071)).

    **Attributes:**

    - `factor`: the divisor of angles that are scaled.
    - `original_positions`: the longest context of the first training.
    - `magnitude`: the factor of cosines and sines. The scores of attention have its square.
    - `beta_fast`, `beta_slow`: the number of rotations within `original_positions` at which the ramp begins and ends.
    - `truncate`: whether the ramp begins and ends at a whole pair.
    """

    factor: Factor
    original_positions: Count
    magnitude: Magnitude
    beta_fast: Rotations = 32.0
    beta_slow: Rotations = 1.0
    truncate: bool = True

    def __post_init__(self):
        check_fields(self, "The rope scaling's {}".format)

    def scaled(self, inv_freq: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
        dim = 2 * len(inv_freq)

        def pair(rotations: float) -> float:
            return dim * math.log(self.original_positions / (2 * math.pi * rotations)) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        # A ramp without length is a step, as in transformers.
        ramp = np.clip((np.arange(len(inv_freq)) - low) / ((high - low) or 0.001), 0, 1)
        return inv_freq * (1 - ramp + ramp / self.factor), self.magnitude


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor of cosines and sines, `1 + 0.1 scale log(factor)`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True)
class QueryScaling:
    """Queries multiplied by `1 + beta * log(1 + floor(position / original_positions))`, as in Llama 4, so that
    attention stays sharp over long contexts.
    """

    beta: Magnitude
    original_positions: Count

    def __post_init__(self):
        check_fields(self, "The query scaling's {}".format)


@dataclasses.dataclass(frozen=True)
class Rope:
    """The angles of the rotary embedding ([RoFormer](https://arxiv.org/abs/2104.09864)).

    **Attributes:**

    - `dim`: the number of entries of a head that are rotated, in pairs.
    - `theta`: the base of the wavelengths.
    - `scaling`: how the angles are scaled, if they are.
    - `query_scaling`: how queries grow with their position, if they do.
    """

    dim: int
    theta: float
    scaling: AbstractRopeScaling | None = None
    query_scaling: QueryScaling | None = None

    @property
    def inv_freq(self) -> np.ndarray:
        """The angle of each pair per position, in radians and float64, shape `(dim / 2,)`."""
        return self._scaled()[0]

    @property
    def magnitude(self) -> float:
        """The factor of all cosines and sines."""
        return self._scaled()[1]

    def _scaled(self) -> tuple[np.ndarray, float]:
        inv_freq = self.theta ** -(np.arange(0, self.dim, 2) / self.dim)
        return (inv_freq, 1.0) if self.scaling is None else self.scaling.scaled(inv_freq, self.theta)
