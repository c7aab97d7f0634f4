"""The interface of callbacks."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from ..nn import Mistral, unstack
from .step import Metrics, TrainState


@dataclasses.dataclass
class Run:
    """A training run, as callbacks see it.

    **Attributes:**

    - `state`: the state that the last step returned. The next step donates its memory; to keep the model, keep
        `model()`.
    - `step`: the number of steps done.
    - `steps`: the number of steps of the whole run, or `None` to train until the batches end.
    - `folder`: the folder of the checkpoints, or `None`.
    - `stop`: a callback sets this to `True` to end the run after this step.
    """

    state: TrainState
    step: int
    steps: int | None
    folder: Path | None
    stop: bool = False

    def model(self) -> Mistral:
        """A copy of the current model, to generate with or to save; training does not change the copy."""
        outer = jax.tree.map(lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf, self.state.model.outer)
        return unstack(dataclasses.replace(self.state.model, outer=outer))  # blocks that are unstacked are copies


class Callback:
    """Code that runs at certain points of a run; override the methods that you need.

    With several processes, a callback runs on each of them.
    """

    def on_start(self, run: Run):
        """Before the first step; `run.step` is above 0 if the run continues from a checkpoint."""

    def on_step(self, run: Run, metrics: Metrics):
        """After each step. Reading `metrics` waits for the step to end."""

    def on_log(self, run: Run, metrics: Mapping[str, float]):
        """Every `log_every` steps, and after the first and the last one; `metrics` are of this step, by name."""

    def on_evaluation(self, run: Run, metrics: Mapping[str, float]):
        """After an evaluation; `metrics` are over all its batches, by name."""

    def on_checkpoint(self, run: Run):
        """When a checkpoint is being written."""

    def on_end(self, run: Run):
        """After the last step, also if an error or a signal ended the run."""

    def get_state(self) -> dict[str, Any]:
        """The state of the callback, as JSON types; each checkpoint stores it."""
        return {}

    def set_state(self, state: dict[str, Any]):
        """Restores what `get_state` returned, when a run continues from a checkpoint."""
