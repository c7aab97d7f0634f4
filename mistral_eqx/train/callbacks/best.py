"""Keeps the best model so far."""

from collections.abc import Mapping
from typing import Any

from ...errors import InputError
from ..callback import Callback, Run
from ..checkpoints import Checkpoints


BEST = "best"


class KeepBest(Callback):
    """Keeps the state with the lowest evaluation loss, in the folder `best` inside the run's folder.

    [`mistral_eqx.Trainer.restore`][] with `best=True` reads it.
    """

    def __init__(self):
        self._checkpoints: Checkpoints | None = None
        self._lowest = float("inf")

    def on_start(self, run: Run):
        if run.folder is None:
            raise InputError("KeepBest stores the best model in the run's folder; give the trainer a checkpoint_dir.")
        self._checkpoints = Checkpoints(run.folder / BEST, {}, keep=1)

    def on_evaluation(self, run: Run, metrics: Mapping[str, float]):
        if metrics["loss"] < self._lowest and self._checkpoints is not None:
            self._lowest = metrics["loss"]
            self._checkpoints.save(run.state, metrics)

    def on_end(self, run: Run):
        if self._checkpoints is not None:
            self._checkpoints.close()

    def get_state(self) -> dict[str, Any]:
        # A checkpoint of the run must not say that a model is kept which a killed process did not write.
        if self._checkpoints is not None:
            self._checkpoints.wait()
        return {"least": self._lowest}

    def set_state(self, state: dict[str, Any]):
        self._lowest = state["least"]
