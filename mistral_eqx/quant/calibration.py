"""Schemes that see the activations of a text: their interface, and the statistics that they get."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import MistralConfig
from ..documents import shown
from ..errors import InputError
from ..nn import AbstractWeight
from .schemes import Layer


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Statistics of the activations `x` that some layers have as their input, over all tokens of the calibration.

    **Attributes:**

    - `hessian`: twice the mean of `x xᵀ`, float32, shape `(inputs, inputs)`. With a change `d` of a row of the weight,
        the mean squared error of its output is `d hessian dᵀ / 2`.
    - `magnitude`: the mean of `|x|`, float32, shape `(inputs,)`; for inputs that can only be scaled together, because
        one number produces all of them, the mean over these.

    Where each of several experts has its own inputs, both have a first axis of experts.
    """

    hessian: np.ndarray
    magnitude: np.ndarray

    def of_expert(self, expert: int) -> "Inputs":
        """The statistics of one expert."""
        return Inputs(self.hessian[expert], self.magnitude[expert])

    def divided(self, factors: np.ndarray) -> "Inputs":
        """The statistics of the activations divided by these factors, shape `(inputs,)`."""
        return Inputs(self.hessian / np.outer(factors, factors), self.magnitude / factors)


class AbstractCalibratedScheme(abc.ABC):
    """A way to quantize a weight that depends on its inputs. To add one, subclass this and define `weight`.

    Layers are quantized block by block, so that the inputs are those that the quantized blocks before produce. Experts
    are quantized one by one, by the tokens that chose them; a scheme with `factors` does not quantize experts, nor a
    model with latent attention.
    """

    def factors(self, numbers: Mapping[str, np.ndarray], inputs: Inputs) -> np.ndarray | None:
        """Factors of the columns of some weights, by which what produces their inputs is divided: the model without
        rounding stays the same.

        **Arguments:**

        - `numbers`: the weights with this scheme that have the same inputs, by their paths; float32, shape
            `(rows, inputs)`.
        - `inputs`: the statistics of these inputs.

        **Returns:** float32, shape `(inputs,)`, equal for inputs that can only be scaled together; `None` to leave the
        weights as they are.
        """
        return None

    @property
    def has_factors(self) -> bool:
        """Whether the scheme scales columns."""
        return type(self).factors is not AbstractCalibratedScheme.factors

    @abc.abstractmethod
    def weight(self, numbers: np.ndarray, layer: Layer, inputs: Inputs) -> AbstractWeight:
        """The weight of these numbers.

        **Arguments:**

        - `numbers`: float32, shape `(*out, *in)`, multiplied by the factors.
        - `layer`: the layer.
        - `inputs`: the statistics of its inputs, divided by the factors.

        **Raises:** `ValueError` that names the layer, if the numbers do not fit the scheme.
        """


def checked_calibration(calibration: Any, config: MistralConfig) -> np.ndarray:
    """The token ids of a calibration, shape `(rows, seq)`.

    There must be as many tokens as the widest layer has inputs: with fewer, some changes of a weight change no output
    that was seen.

    **Raises:** `ValueError` if they are none, are outside the vocabulary, do not fit into the context or are too few.
    """
    try:
        ids = np.asarray(calibration)
    except ValueError:  # rows of several lengths
        ids = None
    if ids is None or ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(
            f"calibration is {shown(calibration)}; give token ids of shape (rows, seq), whole numbers in rows of one "
            "length.",
            key="calibration",
        )
    outside = ids[(ids < 0) | (ids >= config.vocab)]
    if outside.size:
        raise InputError(
            f"calibration has the token id {outside[0]}, but ids of this model are from 0 to {config.vocab - 1}; "
            "encode the text with the model's own tokenizer.",
            key="calibration",
        )
    if ids.shape[1] > config.max_positions:
        raise InputError(
            f"calibration has rows of {ids.shape[1]} tokens, more than the model's context of {config.max_positions}; "
            "give shorter rows.",
            key="calibration",
        )
    needed = max(config.embed, config.hidden, config.q_heads * config.head_dim)
    if ids.size < needed:
        raise InputError(
            f"calibration has {ids.size} tokens, and at least {needed} are needed, as many as a layer has inputs; give "
            "a longer text.",
            key="calibration",
        )
    return ids.astype(np.int32)
