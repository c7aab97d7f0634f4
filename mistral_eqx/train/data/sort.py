"""Sorting of symbols, after [minGPT](https://github.com/karpathy/minGPT)'s demo."""

from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Int

from ...checks import Seed, check_arguments
from .problems import AbstractProblems, digits, split


# With two different symbols, a length above 24 has more problems than `split` accepts.
SortLength = Annotated[int, Ge(1), Le(24)]
Symbols = Annotated[int, Ge(2), Le(2**24)]


class Sort(AbstractProblems):
    """Symbols, followed by the same symbols sorted: `2 0 1` and `0 1 2`."""

    def __init__(self, length: SortLength = 6, symbols: Symbols = 3, *, held_out: bool = False, seed: Seed = 0):
        """**Arguments:**

        - `length`: the number of symbols to sort.
        - `symbols`: the number of different symbols.
        - `held_out`: selects the held-out problems, a fifth of all and at most 1000, or else all others.
        - `seed`: the seed that selects the held-out problems.

        **Raises:** `ValueError` if there are fewer than 5 such problems, or more than 2^24.
        """
        check_arguments(Sort.__init__, length=length, symbols=symbols, seed=seed)
        self.vocab = symbols
        self.seq = 2 * length - 1
        self.length = length
        self.numbers = split(symbols**length, held_out, seed)

    def write(self, numbers: Int[np.ndarray, " problems"]) -> Int[np.ndarray, "problems prompt"]:
        return digits(numbers, self.vocab, self.length)

    def solve(self, prompts: Int[np.ndarray, "problems prompt"]) -> Int[np.ndarray, "problems answer"]:
        return np.sort(prompts, axis=1)
