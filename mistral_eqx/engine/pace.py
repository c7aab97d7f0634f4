"""How much of a prompt is prefilled between two steps of other answers."""

import collections
import statistics


# A chunk may take as long as so many steps. With the step itself, the others then wait for three.
_STEPS = 2
# Fewer tokens take hardly less time, and quantized products of fewer round in another way on CPUs.
_LEAST = 16


class Pace:
    """Measures steps and chunks, and finds the largest chunk that takes at most two steps.

    Sizes are powers of two, and `most`. A chunk that takes too long halves the size; one that takes less than a step
    doubles it.

    **Attributes:**

    - `most`: the size of a chunk while no row decodes.
    - `size`: the size of a chunk while rows decode.
    """

    def __init__(self, most: int):
        self.most = most if most < _LEAST else most // _LEAST * _LEAST
        self.size = min(self.most, 2 * _LEAST)
        self._steps: collections.deque[float] = collections.deque(maxlen=8)

    def step(self, seconds: float):
        """Notes the time of a step."""
        self._steps.append(seconds)

    def chunk(self, width: int, seconds: float):
        """Notes the time of a chunk while rows decode."""
        step = statistics.median(self._steps) if self._steps else seconds
        if seconds > _STEPS * step and self.size > _LEAST:
            self.size = max(_LEAST, 2 ** ((self.size - 1).bit_length() - 1))
        elif seconds < step and width >= self.size:
            self.size = min(self.most, 2 ** (self.size.bit_length()))
