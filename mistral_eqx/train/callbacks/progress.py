"""A progress bar."""

import math
from collections.abc import Mapping

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..callback import Callback, Run
from ..step import Metrics


class ProgressBar(Callback):
    """A bar on stderr with the loss, tokens per second and MFU (model FLOPs utilisation).

    Without a terminal there is no bar.
    """

    def __init__(self):
        self._bar: Progress | None = None

    def on_start(self, run: Run):
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or jax.process_index() > 0,
        )
        self._bar.start()
        # Compiling the first step takes a while.
        self._task = self._bar.add_task("Compiling", total=run.steps, completed=run.step)

    def on_step(self, run: Run, metrics: Metrics):
        if self._bar is not None:
            self._bar.advance(self._task)

    def on_log(self, run: Run, metrics: Mapping[str, float]):
        if self._bar is not None:
            description = f"loss {metrics['loss']:.3f}"
            if not math.isnan(metrics["mfu"]):
                description += f", {metrics['tokens_per_second']:,.0f} tokens/s, MFU {metrics['mfu']:.0%}"
            self._bar.update(self._task, description=description)

    def on_end(self, run: Run):
        if self._bar is not None:
            self._bar.stop()
