"""Numbered problems with answers."""

import abc

import numpy as np
from jaxtyping import Int

from ...errors import InputError
from ..batch import Example
from ..objective import causal


# The most problems: their numbers are shuffled in memory.
_MOST = 2**24
# A fifth of the problems is held out, but no more than this.
_HELD_OUT = 1000


class AbstractProblems(abc.ABC):
    """Problems, each followed by its answer; only the answer has weight as a target.

    For your own problems, set the attributes in `__init__` and define `write` and `solve`.

    **Attributes:**

    - `vocab`: the number of symbols.
    - `seq`: the number of columns of an example.
    - `numbers`: the numbers of the problems in this set, from `split`.
    """

    vocab: int
    seq: int
    numbers: Int[np.ndarray, " problems"]

    @abc.abstractmethod
    def write(self, numbers: Int[np.ndarray, " problems"]) -> Int[np.ndarray, "problems prompt"]:
        """The problems with these numbers."""

    @abc.abstractmethod
    def solve(self, prompts: Int[np.ndarray, "problems prompt"]) -> Int[np.ndarray, "problems answer"]:
        """The answers to these prompts."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        prompt = self.write(self.numbers[[index]])
        answer = self.solve(prompt)
        learned = [0] * prompt.shape[1] + [1] * answer.shape[1]
        return causal(np.concatenate([prompt[0], answer[0]]), learned)

    @property
    def prompts(self) -> Int[np.ndarray, "problems prompt"]:
        """The prompts of all problems of this set."""
        return self.write(self.numbers)

    @property
    def answers(self) -> Int[np.ndarray, "problems answer"]:
        """The correct answers to `prompts`."""
        return self.solve(self.prompts)


def split(count: int, held_out: bool, seed: int) -> Int[np.ndarray, " problems"]:
    """The numbers of the held-out problems, or of all others.

    **Arguments:**

    - `count`: the number of problems.
    - `held_out`: whether to return the held-out ones. The two sets are disjoint, and together have all problems.
    - `seed`: the seed that selects the held-out ones.

    **Raises:** `ValueError` if there are fewer than 5 problems, or more than 2^24.
    """
    if not 5 <= count <= _MOST:
        raise InputError(f"There are {count} such problems, not 5 to {_MOST}; change their length.")
    shuffled = np.random.default_rng(seed).permutation(count)
    at = min(count // 5, _HELD_OUT)
    return shuffled[:at] if held_out else shuffled[at:]


def digits(numbers: Int[np.ndarray, " problems"], base: int, length: int) -> Int[np.ndarray, "problems length"]:
    """The digits of numbers, the most significant first, padded with zeros to `length`."""
    return (numbers[:, None] // base ** np.arange(length)[::-1] % base).astype(np.int32)
