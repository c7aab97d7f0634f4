"""The metrics after a text: tokens, speed and memory."""

import functools
import sys
import time

from . import processes


Metrics = list[tuple[str, str]]
"""Names and values, in the order in which they are shown."""


class Stopwatch:
    """Measures one generation, from the token ids of the prompt on."""

    def __init__(self):
        self._times = [time.perf_counter()]
        self._compiling = [_compiling().seconds]

    def tick(self):
        """Records a token."""
        self._times.append(time.perf_counter())
        self._compiling.append(_compiling().seconds)

    def metrics(self) -> Metrics:
        """The metrics so far.

        The time to the first token includes compilation, which is shown beside it. The rate of decoding excludes
        compilation, because it happens once, and hardly at all in the next run.
        """
        metrics = []
        if len(self._times) > 1:
            compiling = self._compiling[1] - self._compiling[0]
            note = f" ({compiling:.2f} s of it compiling)" if compiling >= 0.05 else ""
            metrics.append(("first token", f"after {self._times[1] - self._times[0]:.2f} s{note}"))
        if len(self._times) > 2:
            decoded = len(self._times) - 2
            compiling = self._compiling[-1] - self._compiling[1]
            note = f" (after {compiling:.2f} s of compiling)" if compiling >= 0.05 else ""
            seconds = self._times[-1] - self._times[1] - compiling
            metrics.append(("decoded", f"{decoded} more at {decoded / max(seconds, 1e-9):.1f} tokens/s{note}"))
        return metrics


class Tally:
    """Measures the decoding of many texts, from its creation on."""

    def __init__(self):
        self._start, self._compiled = time.perf_counter(), _compiling().seconds
        self._prompts = self._read = self._texts = self._tokens = 0

    def add(self, prompts: int, read: int, texts: int, tokens: int):
        """Adds numbers of prompts, prompt tokens, texts and new tokens."""
        self._prompts, self._read = self._prompts + prompts, self._read + read
        self._texts, self._tokens = self._texts + texts, self._tokens + tokens

    def metrics(self, *more: tuple[str, str]) -> Metrics:
        """The metrics so far. Compilation is shown, and excluded from the rate.

        **Arguments:**

        - `more`: metrics to add after the number of prompts.
        """
        compiling = _compiling().seconds - self._compiled
        seconds = time.perf_counter() - self._start
        note = f" ({compiling:.2f} s of it compiling)" if compiling >= 0.05 else ""
        return [
            ("prompts", f"{self._prompts:,} of {_counted(self._read, 'token')}"),
            *more,
            ("texts", f"{self._texts:,} of {_counted(self._tokens, 'token')} in {seconds:.2f} s{note}"),
            ("speed", f"{self._tokens / max(seconds - compiling, 1e-9):.1f} tokens/s"),
        ]


def show(metrics: Metrics):
    """Writes metrics to stderr: a small table on a terminal, otherwise one line."""
    memory = peak_memory()
    if memory is not None:
        metrics = [*metrics, ("peak memory", f"{memory / 1e6:,.0f} MB")]
    if not sys.stderr.isatty():
        processes.say(" | ".join(f"{name} {value}" for name, value in metrics))
        return
    width = max(len(name) for name, _ in metrics)
    processes.say("\n".join(f"{name:{width}}  {value}" for name, value in metrics))


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


class _CompileClock:
    """Sums the time that JAX spends tracing and compiling."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self, event: str, duration_secs: float, **kwargs: str | int):
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs


@functools.cache
def _compiling() -> _CompileClock:
    import jax

    clock = _CompileClock()
    jax.monitoring.register_event_duration_secs_listener(clock)
    return clock


def peak_memory() -> int | None:
    """The peak memory of this process in bytes; `None` where the system does not report it."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
