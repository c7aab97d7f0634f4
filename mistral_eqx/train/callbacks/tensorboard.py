"""Metrics for TensorBoard."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ...errors import InputError
from ..callback import Callback, Run


class TensorBoard(Callback):
    """Writes metrics for `tensorboard --logdir FOLDER`. It needs the extra `tensorboard`.

    **Arguments:**

    - `folder`: the folder of the event files; the folder `tensorboard` in the run's folder unless given.
    """

    def __init__(self, folder: str | Path | None = None):
        if importlib.util.find_spec("tensorboardX") is None:
            raise InputError("TensorBoard needs the extra `tensorboard`: pip install 'mistral-eqx[tensorboard]'.")
        self._folder = folder
        self._writer: Any = None

    def on_start(self, run: Run):
        folder = self._folder or (run.folder / "tensorboard" if run.folder is not None else None)
        if folder is None:
            raise InputError("There is no folder for TensorBoard; give it a folder, or the trainer a checkpoint_dir.")
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            # TensorBoard hides what an interrupted run wrote after this step.
            self._writer = SummaryWriter(str(folder), purge_step=run.step + 1)

    def on_log(self, run: Run, metrics: Mapping[str, float]):
        self._write("training", run, metrics)

    def on_evaluation(self, run: Run, metrics: Mapping[str, float]):
        self._write("evaluation", run, metrics)

    def on_end(self, run: Run):
        if self._writer is not None:
            self._writer.close()

    def _write(self, kind: str, run: Run, metrics: Mapping[str, float]):
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(f"{kind}/{name}", value, run.step)
