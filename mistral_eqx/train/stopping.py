"""A signal ends training between two steps, not within one."""

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from .. import interrupts


class Stopping:
    """Inside this context, ctrl-C and SIGTERM wait for the step to end; a second signal acts at once.

    Several processes that train together stop after the same step, and SIGTERM to any of them stops all. With several
    processes, or outside the main thread, the handler of ctrl-C is not changed.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._section = contextlib.ExitStack()

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            # Otherwise the handler of the command line would end the process at once.
            self._section.enter_context(interrupts.answered())
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: Any):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signal is not None:
            interrupts.take()
        self._section.close()

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process must call this after every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def end(self):
        """Raises what the signal would have raised, if there was one.

        **Raises:** `KeyboardInterrupt` or `SystemExit`.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)

    def _on_signal(self, number: int, frame: FrameType | None):
        self.signal = signal.Signals(number)
        # A second signal acts at once.
        signal.signal(number, self._before[self.signal])
