"""Problems that have an answer, all of them numbered."""

import abc

import numpy as np
from jaxtyping import Int

from ...errors import InputError
from ..batch import Example
from ..objective import causal


# How many numbers are shuffled in memory.
_MOST = 2**24
# A fifth of the problems is held out, but no more than this.
_HELD_OUT = 1000


class AbstractProblems(abc.ABC):
    """Problems, each with the answer behind it, of which only the answer is to be told.

    To write your own, set the attributes in `__init__` and define `write` and `solve`.

    **Attributes:**

    - `vocab`: how many symbols there are.
    - `seq`: how many columns an example has.
    - `numbers`: of the problems that are in this set, by `split`.
    """

    vocab: int
    seq: int
    numbers: Int[np.ndarray, " problems"]

    @abc.abstractmethod
    def write(self, numbers: Int[np.ndarray, " problems"]) -> Int[np.ndarray, "problems prompt"]:
        """The problems with these numbers."""

    @abc.abstractmethod
    def solve(self, prompts: Int[np.ndarray, "problems prompt"]) -> Int[np.ndarray, "problems answer"]:
        """Their answers."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        prompt = self.write(self.numbers[[index]])
        answer = self.solve(prompt)
        learned = [0] * prompt.shape[1] + [1] * answer.shape[1]
        return causal(np.concatenate([prompt[0], answer[0]]), learned)

    @property
    def prompts(self) -> Int[np.ndarray, "problems prompt"]:
        """All problems of this set, to have them answered."""
        return self.write(self.numbers)

    @property
    def answers(self) -> Int[np.ndarray, "problems answer"]:
        """What the answers should be."""
        return self.solve(self.prompts)


def split(count: int, held_out: bool, seed: int) -> Int[np.ndarray, " problems"]:
    """The numbers of the problems that are held out, or of all others.

    **Arguments:**

    - `count`: how many problems there are.
    - `held_out`: which of the two. They have no number in common, and together all.
    - `seed`: draws them.

    **Raises:** `ValueError` if there are too few to hold one out, or too many.
    """
    if not 5 <= count <= _MOST:
        raise InputError(f"There are {count} such problems, not 5 to {_MOST}; change how long they are.")
    shuffled = np.random.default_rng(seed).permutation(count)
    at = min(count // 5, _HELD_OUT)
    return shuffled[:at] if held_out else shuffled[at:]


def digits(numbers: Int[np.ndarray, " problems"], base: int, length: int) -> Int[np.ndarray, "problems length"]:
    """Numbers written with so many digits, the largest first."""
    return (numbers[:, None] // base ** np.arange(length)[::-1] % base).astype(np.int32)
