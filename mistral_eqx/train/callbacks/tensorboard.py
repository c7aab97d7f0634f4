"""Curves in TensorBoard."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ...errors import InputError
from ..callback import Callback, Run


class TensorBoard(Callback):
    """Writes figures for TensorBoard: `tensorboard --logdir FOLDER`. It takes the extra `tensorboard`.

    **Arguments:**

    - `folder`: where; the folder `tensorboard` in the run's own unless given.
    """

    def __init__(self, folder: str | Path | None = None):
        if importlib.util.find_spec("tensorboardX") is None:
            raise InputError("TensorBoard takes the extra `tensorboard`: pip install 'mistral-eqx[tensorboard]'.")
        self._folder = folder
        self._writer: Any = None

    def on_start(self, run: Run):
        folder = self._folder or (run.folder / "tensorboard" if run.folder is not None else None)
        if folder is None:
            raise InputError("There is no folder for TensorBoard; name one, or give the trainer a checkpoint_dir.")
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            # What a run that was cut off wrote behind this step is hidden.
            self._writer = SummaryWriter(str(folder), purge_step=run.step + 1)

    def on_log(self, run: Run, figures: Mapping[str, float]):
        self._write("training", run, figures)

    def on_evaluation(self, run: Run, figures: Mapping[str, float]):
        self._write("evaluation", run, figures)

    def on_end(self, run: Run):
        if self._writer is not None:
            self._writer.close()

    def _write(self, kind: str, run: Run, figures: Mapping[str, float]):
        if self._writer is not None:
            for name, figure in figures.items():
                self._writer.add_scalar(f"{kind}/{name}", figure, run.step)
