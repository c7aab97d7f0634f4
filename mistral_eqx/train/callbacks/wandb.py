"""Metrics for Weights & Biases."""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import jax

from ...errors import InputError
from ..callback import Callback, Run


class WandB(Callback):
    """Sends metrics to Weights & Biases. It needs the extra `wandb`, and an account unless `mode` is `"offline"`.

    A run that continues from a checkpoint continues the same run of Weights & Biases.

    **Arguments:**

    - `project`: the name of the project.
    - `**settings`: other arguments of `wandb.init`, such as `mode="offline"`, `name` or `dir`.
    """

    def __init__(self, project: str, **settings: Any):
        if importlib.util.find_spec("wandb") is None:
            raise InputError("Weights & Biases needs the extra `wandb`: pip install 'mistral-eqx[wandb]'.")
        self._settings = {"project": project, **settings}
        self._run: Any = None

    def on_start(self, run: Run):
        if jax.process_index() == 0:
            wandb: Any = importlib.import_module("wandb")
            self._run = wandb.init(resume="allow", **self._settings)
            self._settings["id"] = self._run.id

    def on_log(self, run: Run, metrics: Mapping[str, float]):
        self._send("training", run, metrics)

    def on_evaluation(self, run: Run, metrics: Mapping[str, float]):
        self._send("evaluation", run, metrics)

    def on_end(self, run: Run):
        if self._run is not None:
            self._run.finish()

    def get_state(self) -> dict[str, Any]:
        return {"id": self._settings.get("id")}

    def set_state(self, state: dict[str, Any]):
        if state["id"] is not None:
            self._settings.setdefault("id", state["id"])

    def _send(self, kind: str, run: Run, metrics: Mapping[str, float]):
        if self._run is not None:
            self._run.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=run.step)
