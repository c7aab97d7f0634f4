"""What may happen beside training, and when."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..nn import Mistral
from .step import Metrics, TrainState


@dataclasses.dataclass
class Run:
    """A run of training, as callbacks see it.

    **Attributes:**

    - `state`: what the last step returned. The next step takes its memory; to keep something, keep `model()`.
    - `step`: how many steps were made.
    - `steps`: how many steps the run is to have.
    - `folder`: where the run keeps its checkpoints, or `None`.
    - `stop`: a callback sets it, and the run ends after this step.
    """

    state: TrainState
    step: int
    steps: int | None
    folder: Path | None
    stop: bool = False

    def model(self) -> Mistral:
        """The model as it is now, to generate with or to save: a copy, which training leaves alone."""
        return self.state.unstacked()


class Callback:
    """Something that is done in the course of a run; override what you need.

    A callback of several processes runs on each of them.
    """

    def on_start(self, run: Run):
        """Before the first step; `run.step` tells whether the run goes on from a checkpoint."""

    def on_step(self, run: Run, metrics: Metrics):
        """After each step. To look at `metrics` is to wait for the step."""

    def on_log(self, run: Run, figures: Mapping[str, float]):
        """Every `log_every` steps, and after the first and the last one: figures of this step, by name."""

    def on_evaluation(self, run: Run, figures: Mapping[str, float]):
        """After the batches for evaluation were measured: figures by name."""

    def on_checkpoint(self, run: Run):
        """When a checkpoint is on its way to the disk."""

    def on_end(self, run: Run):
        """After the last step, also where an error or a signal made it the last one."""

    def get_state(self) -> dict[str, Any]:
        """What the callback has to know to go on, in JSON's types; it becomes part of each checkpoint."""
        return {}

    def set_state(self, state: dict[str, Any]):
        """Takes what `get_state` gave, where a run goes on from a checkpoint."""
