"""Moves factors to the columns of layers from what produces their input; the function of a block stays the same."""

import dataclasses

import numpy as np

from ..nn import Block
from ..nn.layers import dims_of, quantizable_layers


@dataclasses.dataclass(frozen=True)
class SharedInput:
    """An input that some layers of a block have in common.

    **Attributes:**

    - `layers`: the paths of these layers in the block.
    - `producer`: the norm, or the layer, whose outputs the input is proportional to; `None` if no layer can take
        factors of the input alone.
    """

    layers: tuple[str, ...]
    producer: str | None = None

    def dims(self, block: Block) -> list[str]:
        """The dimensions of the input."""
        return dims_of(quantizable_layers(block)[self.layers[0]])[0].split()

    def together(self, block: Block) -> tuple[int, ...]:
        """The axes along which all entries can only be scaled together: query heads share a value head."""
        producer = quantizable_layers(block).get(self.producer or "")
        produced = "embed" if producer is None else dims_of(producer)[1]
        return tuple(axis for axis, dim in enumerate(self.dims(block)) if dim not in produced.split())

    def scale(self, block: Block, numbers: dict[str, np.ndarray], factors: np.ndarray):
        """Multiplies the columns of the layers, and divides what produces their input.

        **Arguments:**

        - `block`: the block.
        - `numbers`: its weights and norms by their paths, replaced by the scaled ones.
        - `factors`: for each input, shape `(inputs,)`.
        """
        assert self.producer is not None
        axes, together = len(self.dims(block)), self.together(block)
        of_inputs = factors.reshape(numbers[self.layers[0]].shape[-axes:])
        for path in self.layers:
            numbers[path] = numbers[path] * of_inputs
        of_outputs = of_inputs[tuple(0 if axis in together else slice(None) for axis in range(axes))]
        inner = numbers[self.producer].ndim - of_outputs.ndim
        numbers[self.producer] = numbers[self.producer] / of_outputs.reshape(*of_outputs.shape, *[1] * inner)


SHARED = (
    SharedInput(("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention_norm"),
    SharedInput(("attention.o_proj",), "attention.v_proj"),
    SharedInput(("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward_norm"),
    SharedInput(("feed_forward.down_proj",), "feed_forward.up_proj"),
    SharedInput(("attention.q_a_proj", "attention.kv_a_proj")),
    SharedInput(("attention.q_b_proj",)),
    SharedInput(("attention.kv_b_proj",)),
    SharedInput(("feed_forward.shared.gate_proj", "feed_forward.shared.up_proj")),
    SharedInput(("feed_forward.shared.down_proj",)),
)
"""The inputs of all layers of a block. Those of experts have statistics for each expert."""
