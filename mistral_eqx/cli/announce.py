"""Says at which step a training run begins, and remembers how far it is."""

from ..train import Callback, Metrics, Run
from . import processes


class Announce(Callback):
    """**Attributes:** `step`, the number of steps done."""

    step = 0

    def on_start(self, run: Run):
        self.step = run.step
        if run.step:
            processes.say(f"The run continues after step {run.step}.")

    def on_step(self, run: Run, metrics: Metrics):
        self.step = run.step
