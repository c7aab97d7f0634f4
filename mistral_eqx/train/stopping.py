"""End between two steps, and not within one."""

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from .. import interrupts


class Stopping:
    """While this is entered, ctrl-C and SIGTERM wait for the step to end; a second one does not.

    Where several processes train together they stop after the same step, and SIGTERM to any of them stops all. There,
    or in another thread than the main one, ctrl-C does what it did.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._section = contextlib.ExitStack()

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            # On the command line a signal would end the process.
            self._section.enter_context(interrupts.answered())
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *error: Any):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signal is not None:
            interrupts.take()
        self._section.close()

    def wanted(self, step: int) -> bool:
        """Whether to stop after this step; all processes ask after each."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def end(self):
        """Ends as the signal would have, if there was one.

        **Raises:** `KeyboardInterrupt` or `SystemExit`.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)

    def _came(self, number: int, frame: FrameType | None):
        self.signal = signal.Signals(number)
        # The next one is not held up.
        signal.signal(number, self._before[self.signal])
