"""Put symbols in order, after [minGPT](https://github.com/karpathy/minGPT)'s demo."""

import numpy as np
from jaxtyping import Int

from .problems import AbstractProblems, digits, split


class Sort(AbstractProblems):
    """Symbols, and behind them the same ones sorted: `2 0 1` and `0 1 2`."""

    def __init__(self, length: int = 6, symbols: int = 3, *, held_out: bool = False, seed: int = 0):
        """**Arguments:**

        - `length`: how many symbols are to be sorted.
        - `symbols`: how many different ones there are.
        - `held_out`: whether these are the problems that are kept from training: a fifth, and at most a thousand.
        - `seed`: draws which ones these are.

        **Raises:** `ValueError` if there are fewer than 5 such problems, or more than 2^24.
        """
        self.vocab = symbols
        self.seq = 2 * length - 1
        self.length = length
        self.numbers = split(symbols**length, held_out, seed)

    def write(self, numbers: Int[np.ndarray, " problems"]) -> Int[np.ndarray, "problems prompt"]:
        return digits(numbers, self.vocab, self.length)

    def solve(self, prompts: Int[np.ndarray, "problems prompt"]) -> Int[np.ndarray, "problems answer"]:
        return np.sort(prompts, axis=1)
