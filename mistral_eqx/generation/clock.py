"""What a pass over proposals costs, measured."""

import functools
import math
from collections.abc import Hashable

from ..parallel import broadcast


# Of so many passes of each kind, the shortest counts: the first one may include compilation.
_SAMPLES = 3


class Clock:
    """Measures the time of passes over proposals and of steps without, in turn, until it has a few of both.

    **Attributes:**

    - `cost`: the time of a pass over proposals in steps without; `None` until it is measured. All processes have that
        of process 0, so that they decode alike.
    """

    def __init__(self):
        self.cost: float | None = None
        self._seconds: tuple[list[float], list[float]] = [], []

    @property
    def wanted(self) -> float:
        """The cost that makes the loop take a pass of the kind that is measured next: zero or infinite."""
        passes, steps = self._seconds
        return 0.0 if len(passes) <= len(steps) else math.inf

    def add(self, seconds: float):
        """Adds the time of a pass of the wanted kind."""
        passes, steps = self._seconds
        (passes if len(passes) <= len(steps) else steps).append(seconds)
        if len(steps) == _SAMPLES:
            self.cost = float(broadcast(repr(min(passes) / min(steps))))


@functools.lru_cache(maxsize=64)
def clock_of(*kind: Hashable) -> Clock:
    """The clock of a program, the same one in all calls of this process."""
    return Clock()
