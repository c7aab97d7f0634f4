"""Addition of two numbers, after [minGPT](https://github.com/karpathy/minGPT)'s demo."""

from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Int

from ...checks import Seed, check_arguments
from .problems import AbstractProblems, digits, split


Digits = Annotated[int, Ge(1), Le(3)]


class Adder(AbstractProblems):
    """Two numbers, followed by their sum, least significant digit first as in written addition: `85 50`, `531`.

    Numbers are padded with zeros, so that all problems have the same length.
    """

    def __init__(self, digits: Digits = 2, *, held_out: bool = False, seed: Seed = 0):
        """**Arguments:**

        - `digits`: the number of digits of each number.
        - `held_out`: selects the held-out problems, a fifth of all and at most 1000, or else all others.
        - `seed`: the seed that selects the held-out problems.

        **Raises:** `ValueError` if there are fewer than 5 such problems, or more than 2^24.
        """
        check_arguments(Adder.__init__, digits=digits, seed=seed)
        self.vocab = 10
        self.seq = 3 * digits
        self.digits = digits
        self.numbers = split(10 ** (2 * digits), held_out, seed)

    def write(self, numbers: Int[np.ndarray, " problems"]) -> Int[np.ndarray, "problems prompt"]:
        return digits(numbers, 10, 2 * self.digits)

    def solve(self, prompts: Int[np.ndarray, "problems prompt"]) -> Int[np.ndarray, "problems answer"]:
        powers = 10 ** np.arange(self.digits)[::-1]
        sums = prompts[:, : self.digits] @ powers + prompts[:, self.digits :] @ powers
        return digits(sums, 10, self.digits + 1)[:, ::-1]
