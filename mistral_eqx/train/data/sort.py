"""Put symbols in order, after [minGPT](https://github.com/karpathy/minGPT)'s demo."""

from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Int

from ...checks import Seed, check_arguments
from .problems import AbstractProblems, digits, split


# More than 24 symbols of two kinds are more problems than fit.
SortLength = Annotated[int, Ge(1), Le(24)]
Symbols = Annotated[int, Ge(2), Le(2**24)]


class Sort(AbstractProblems):
    """Symbols, and behind them the same ones sorted: `2 0 1` and `0 1 2`."""

    def __init__(self, length: SortLength = 6, symbols: Symbols = 3, *, held_out: bool = False, seed: Seed = 0):
        """**Arguments:**

        - `length`: how many symbols are to be sorted.
        - `symbols`: how many different ones there are.
        - `held_out`: whether these are the problems that are kept from training: a fifth, and at most a thousand.
        - `seed`: draws which ones these are.

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
