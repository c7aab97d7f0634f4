"""Stop when nothing gets better."""

from collections.abc import Mapping
from typing import Any

from ...checks import Count, NotNegative, check_arguments
from ..callback import Callback, Run


class EarlyStop(Callback):
    """Ends the run when the loss at evaluations has not fallen for a while.

    **Arguments:**

    - `patience`: after how many evaluations in a row without a new least loss the run ends.
    - `by`: by how much the loss must be less than the least so far to count.
    """

    def __init__(self, patience: Count, *, by: NotNegative = 0.0):
        check_arguments(EarlyStop.__init__, patience=patience, by=by)
        self._patience, self._by = patience, by
        self._least, self._since = float("inf"), 0

    def on_evaluation(self, run: Run, figures: Mapping[str, float]):
        if figures["loss"] < self._least - self._by:
            self._least, self._since = figures["loss"], 0
        else:
            self._since += 1
        run.stop = run.stop or self._since >= self._patience

    def get_state(self) -> dict[str, Any]:
        return {"least": self._least, "since": self._since}

    def set_state(self, state: dict[str, Any]):
        self._least, self._since = state["least"], state["since"]
