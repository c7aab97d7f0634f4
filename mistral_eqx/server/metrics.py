"""Metrics in the text format of Prometheus."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine import Engine


_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine))
        self._requests = Counter("mistral_eqx_requests", "HTTP requests.", ["path", "status"], registry=self._registry)
        self._request = self._histogram("request", "From a request to the end of its answer.")
        self._first = self._histogram("first_token", "From a request to its first token.")
        self._between = self._histogram("between_tokens", "From a token of an answer to the next.")

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"mistral_eqx_{name}_seconds", help, registry=self._registry, buckets=_SECONDS)

    def count(self, path: str, status: int, seconds: float):
        """Counts an HTTP request that ended."""
        self._requests.labels(path, str(status)).inc()
        self._request.observe(seconds)

    def clock(self) -> "Clock":
        """A clock for the tokens of a request that begins now."""
        return Clock(self._first, self._between)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)


class Clock:
    """Measures the times of the tokens of one HTTP request."""

    def __init__(self, first: Histogram, between: Histogram):
        self._first, self._between = first, between
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}

    def tick(self, choice: int):
        """Notes that a choice has new tokens."""
        now = time.perf_counter()
        if choice in self._last:
            self._between.observe(now - self._last[choice])
        else:
            self._first.observe(now - self._start)
        self._last[choice] = now


class _OfEngine(Collector):
    """What the engine counts, read when the metrics are."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        load = self._engine.load
        for name, help, value in (
            ("rows", "The most rows of the batch.", self._engine.rows),
            ("step_rows", "Rows that a step computes.", load.rows),
            ("active_rows", "Rows that decode.", load.active),
            ("waiting_requests", "Requests that wait for a row, or whose prompt is prefilled.", load.waiting),
            ("cache_slots", "Tokens of each row for which the KV cache has room.", load.slots),
            ("prefix_cache_bytes", "The size of the prefix cache.", load.prefix_bytes),
        ):
            yield GaugeMetricFamily(f"mistral_eqx_{name}", help, value)
        for name, help, value in (
            ("prompt_tokens", "Tokens of prompts.", load.prompt_tokens),
            ("cached_tokens", "Tokens of prompts that came out of the prefix cache.", load.cached_tokens),
            ("new_tokens", "Tokens of answers.", load.new_tokens),
            ("proposed_tokens", "Tokens that a prompt lookup or a draft proposed.", load.proposed),
            ("accepted_tokens", "Proposed tokens that the model chose too.", load.accepted),
        ):
            yield CounterMetricFamily(f"mistral_eqx_{name}", help, value)
        finished = CounterMetricFamily("mistral_eqx_answers", "Answers by the reason of their end.", labels=["finish"])
        for finish, count in sorted(load.finished.items()):
            finished.add_metric([finish], count)
        yield finished
