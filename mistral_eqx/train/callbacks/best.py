"""Keep the best model so far."""

from collections.abc import Mapping
from typing import Any

from ...errors import InputError
from ..callback import Callback, Run
from ..checkpoints import Checkpoints


BEST = "best"


class KeepBest(Callback):
    """Keeps the state with the least loss at an evaluation, in the folder `best` beside the run's checkpoints.

    [`mistral_eqx.Trainer.restore`][] reads it.
    """

    def __init__(self):
        self._checkpoints: Checkpoints | None = None
        self._least = float("inf")

    def on_start(self, run: Run):
        if run.folder is None:
            raise InputError("The best model is kept beside a run's checkpoints; give the trainer a checkpoint_dir.")
        self._checkpoints = Checkpoints(run.folder / BEST, {}, keep=1)

    def on_evaluation(self, run: Run, figures: Mapping[str, float]):
        if figures["loss"] < self._least and self._checkpoints is not None:
            self._least = figures["loss"]
            self._checkpoints.save(run.state, figures)

    def on_end(self, run: Run):
        if self._checkpoints is not None:
            self._checkpoints.close()

    def get_state(self) -> dict[str, Any]:
        return {"least": self._least}

    def set_state(self, state: dict[str, Any]):
        self._least = state["least"]
