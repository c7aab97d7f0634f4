"""Proposed tokens: what followed the last n-gram of a row before, and whether that pays."""

import collections
import statistics
from collections.abc import Iterable

from ..generation.proposals import Draft, Speculate


# After a trial that did not pay, so many steps without proposals; twice as many after the next, up to a limit.
_PAUSE, _LONGEST_PAUSE = 8, 128
# A draft then reads what it lacks, so that it may pause for longer than most answers take.
_LONGEST_PAUSE_OF_DRAFT = 1024
# A draft would propose in each pass, so that so many steps without are measured first.
_STEPS = 3


class History:
    """A row's tokens, and where each n-gram came last.

    It proposes the tokens of `generation.proposals.look_up`.

    **Arguments:**

    - `ids`: the first tokens.
    - `ngram`: how many last tokens must occur before.
    """

    def __init__(self, ids: Iterable[int], ngram: int):
        self._ids: list[int] = []
        self._ngram = ngram
        self._after: dict[tuple[int, ...], int] = {}
        self._found: int | None = None
        for id in ids:
            self.push(id)

    def push(self, id: int):
        """Adds a token."""
        self._ids.append(id)
        if len(self._ids) >= self._ngram:
            last = tuple(self._ids[-self._ngram :])
            self._found = self._after.get(last)
            self._after[last] = len(self._ids)

    def propose(self, count: int) -> list[int]:
        """The next tokens, if the text goes on as before; -1 if its end is new."""
        if self._found is None:
            return [-1] * count
        # If fewer follow, they are repeated: the text has that period so far.
        return [self._ids[self._found + number % (len(self._ids) - self._found)] for number in range(count)]


class Balance:
    """Whether proposals pay: the average number of new tokens of a row in a pass, and what a pass costs in steps.

    The rules are those of `generation.speculation.Balance`, whose passes are in one compiled loop.

    **Arguments:**

    - `wanted`: from the call; its `cost` is measured unless given.
    """

    def __init__(self, wanted: Speculate):
        is_draft = isinstance(wanted, Draft)
        self._cost = wanted.cost
        self._gain = 1 + wanted.tokens / (1 if is_draft else 4)
        # Over about how many passes the average is.
        self._window = 16 if is_draft else 4
        self._wait, self._pause = 0, _PAUSE
        self._longest = _LONGEST_PAUSE_OF_DRAFT if is_draft else _LONGEST_PAUSE
        self._least = _STEPS if is_draft and wanted.cost is None else 0
        self._seconds = collections.defaultdict[tuple[int, bool], collections.deque[float]](
            lambda: collections.deque(maxlen=8)
        )

    def ready(self, rows: int) -> bool:
        """Whether the next pass, of so many rows, is one over proposals."""
        return self._wait == 0 and len(self._seconds[rows, False]) >= self._least

    def after_pass(self, rows: int, tokens: float, seconds: float):
        """After a pass of so many rows that gave one that decodes so many tokens on average."""
        self._seconds[rows, True].append(seconds)
        cost = self.cost(rows)
        self._gain += (tokens - self._gain) / self._window
        if tokens >= cost:
            self._pause = _PAUSE
        if self._gain < cost:
            # The first pass after a pause decides again.
            self._gain, self._wait = cost, self._pause
            self._pause = min(2 * self._pause, self._longest)

    def after_step(self, rows: int, seconds: float):
        """After a step of so many rows without proposals."""
        self._seconds[rows, False].append(seconds)
        self._wait = max(self._wait - 1, 0)

    def cost(self, rows: int) -> float:
        """The time of a pass in steps."""
        if self._cost is not None:
            return self._cost
        passes, steps = self._seconds[rows, True], self._seconds[rows, False]
        # Before anything is known, proposals are tried.
        return statistics.median(passes) / statistics.median(steps) if passes and steps else 1.0
