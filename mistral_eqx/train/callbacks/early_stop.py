"""Stops a run whose evaluation loss no longer falls."""

from collections.abc import Mapping
from typing import Any

from ...checks import Count, NotNegative, check_arguments
from ..callback import Callback, Run


class EarlyStop(Callback):
    """Ends the run when the evaluation loss no longer falls.

    **Arguments:**

    - `patience`: the run ends after this many evaluations in a row without a new lowest loss.
    - `by`: a new lowest loss must be lower than the last one by more than this.
    """

    def __init__(self, patience: Count, *, by: NotNegative = 0.0):
        check_arguments(EarlyStop.__init__, patience=patience, by=by)
        self._patience, self._by = patience, by
        self._lowest, self._since = float("inf"), 0

    def on_evaluation(self, run: Run, metrics: Mapping[str, float]):
        if metrics["loss"] < self._lowest - self._by:
            self._lowest, self._since = metrics["loss"], 0
        else:
            self._since += 1
        run.stop = run.stop or self._since >= self._patience

    def get_state(self) -> dict[str, Any]:
        return {"least": self._lowest, "since": self._since}

    def set_state(self, state: dict[str, Any]):
        self._lowest, self._since = state["least"], state["since"]
