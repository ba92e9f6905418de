"""What ``/metrics`` shows, in the words of Prometheus.

Runs in the front, and is counted in the front alone: a worker that is killed takes no figure along,
and leaves no file. Gauges are read when somebody asks; the rest is counted as it happens.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter as Counted
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import accumulate
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .task import Task, TaskState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A handler may take a millisecond or a night.
_TASK_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 4 * 3600, 12 * 3600,
)  # fmt: skip
_SHORT_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_LAG_EVERY_S = 0.25
_End = tuple[str, TaskState, str]  # function, state, reason


class Observed(Protocol):
    """Where the gauges are read."""

    @property
    def queue_depth(self) -> int:
        """How many tasks wait for a worker."""

    def count_workers(self) -> dict[str, int]:
        """Return how many slots are in each state."""

    def device_memory(self) -> Iterable[tuple[int, str, int, int]]:
        """Return slot, device, used and total bytes, wherever that is known."""


class Metrics:
    """Counts, for one front."""

    def __init__(self) -> None:
        # A time stamp beside every counter, which nobody reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no types
        self._registry = CollectorRegistry()
        self._tasks = Counter(
            "ogpu_tasks",
            "Tasks that have ended, by function, terminal state, and reason of a failure",
            ("function", "state", "reason"),
            registry=self._registry,
        )
        self._queue_s = self._histogram(
            "ogpu_task_queue_seconds", "How long tasks waited for a worker", _TASK_BUCKETS_S
        )
        self._run_s = self._histogram(
            "ogpu_task_run_seconds", "How long tasks ran", _TASK_BUCKETS_S, "function"
        )
        self._batch_size = self._histogram(
            "ogpu_batch_size",
            "How many tasks were run together, of handlers with a batch_size",
            _BATCH_SIZES,
            "function",
        )
        self._restarts = Counter(
            "ogpu_worker_restarts",
            "Workers that ended and were to be replaced, by reason",
            ("reason",),
            registry=self._registry,
        )
        self._init_s = self._histogram(
            "ogpu_init_seconds", "How long @init and warm-ups took", _TASK_BUCKETS_S
        )
        self._callbacks = Counter(
            "ogpu_callback_attempts",
            "Attempts to deliver a callback, by outcome",
            ("outcome",),
            registry=self._registry,
        )
        self._commit_s = self._histogram(
            "ogpu_journal_commit_seconds", "How long commits of the journal took", _SHORT_BUCKETS_S
        )
        self._lag_s = self._histogram(
            "ogpu_loop_lag_seconds", "How late the event loop of the front was", _SHORT_BUCKETS_S
        )
        self._begun: list[tuple[datetime, datetime | None]] = []
        self._ended: list[tuple[_End, datetime | None, datetime | None]] = []

    def _histogram(
        self, name: str, help_text: str, bounds: Sequence[float], label: str | None = None
    ) -> _Histogram:
        histogram = _Histogram(name, help_text, bounds, label)
        self._registry.register(histogram)
        return histogram

    # --- what happens

    def on_transition(self, task: Task) -> None:
        """Take notice of a transition (a listener of the journal); it is counted a moment later.

        Counted at once, between two other things, it took 13 µs of the front's 140 for a task
        (echo at concurrency 32); many at a time take 4.
        """
        if task.state is TaskState.RUNNING:
            # A later attempt waited for its first one, too, which is no time in the queue.
            if task.attempt == 1:
                self._begun.append((task.accepted_at, task.started_at))
        elif task.state.is_terminal:
            reason = task.error.reason.value if task.error else ""
            key = (task.function, task.state, reason)
            self._ended.append((key, task.started_at, task.finished_at))

    def _count(self) -> None:
        """Count what was taken notice of."""
        begun, self._begun = self._begun, []
        for accepted_at, started_at in begun:
            if started_at is not None:
                self._queue_s.observe((started_at - accepted_at).total_seconds())
        ended, self._ended = self._ended, []
        for (function, _, _), started_at, finished_at in ended:
            if started_at is not None and finished_at is not None:
                self._run_s.observe((finished_at - started_at).total_seconds(), function)
        for (function, state, reason), count in Counted(end for end, _, _ in ended).items():
            self._tasks.labels(function, state.value, reason).inc(count)

    def on_batch(self, function: str, size: int) -> None:
        """Count tasks that are run together."""
        self._batch_size.observe(size, function)

    def on_commit(self, took_s: float) -> None:
        """Count a commit of the journal."""
        self._commit_s.observe(took_s)

    def on_init(self, took_s: float) -> None:
        """Count a worker that is ready."""
        self._init_s.observe(took_s)

    def on_restart(self, reason: str) -> None:
        """Count a worker that has ended and is to be replaced."""
        self._restarts.labels(reason).inc()

    def on_callback(self, outcome: str) -> None:
        """Count an attempt to deliver (see ``AttemptOutcome``)."""
        self._callbacks.labels(outcome).inc()

    async def watch_loop(self) -> None:
        """Measure, until cancelled, how late the event loop is; and count what has happened."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self._lag_s.observe(max(0.0, loop.time() - due))
            self._count()

    # --- what is asked

    def observe(self, pool: Observed, undelivered: Callable[[], int]) -> None:
        """Say where the gauges are read."""
        self._registry.register(_Gauges(pool, undelivered))

    def render(self) -> bytes:
        """Return all of it, in the text format of Prometheus."""
        self._count()
        return generate_latest(self._registry)


class _Histogram(Collector):
    """A histogram with one label at most.

    The library's own looks at its buckets one by one, with a lock: 1.6 µs, where this takes 0.2.
    """

    def __init__(
        self, name: str, help_text: str, bounds: Sequence[float], label: str | None
    ) -> None:
        self._name, self._help = name, help_text
        self._bounds = bounds
        self._label = label
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        if label is None:  # it is shown before anything was observed
            self._add("")

    def observe(self, value: float, label: str = "") -> None:
        """Count a value."""
        if label not in self._counts:
            self._add(label)
        self._counts[label][bisect_left(self._bounds, value)] += 1
        self._sums[label] += value

    def _add(self, label: str) -> None:
        self._counts[label] = [0] * (len(self._bounds) + 1)
        self._sums[label] = 0.0

    def collect(self) -> Iterator[Metric]:
        labels = [] if self._label is None else [self._label]
        family = HistogramMetricFamily(self._name, self._help, labels=labels)
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        for label, counts in self._counts.items():
            buckets = list(zip(names, map(float, accumulate(counts)), strict=True))
            family.add_metric([label][: len(labels)], buckets, self._sums[label])
        yield family


class _Gauges(Collector):
    def __init__(self, pool: Observed, undelivered: Callable[[], int]) -> None:
        self._pool = pool
        self._undelivered = undelivered

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "ogpu_queue_depth", "Tasks that wait for a worker", self._pool.queue_depth
        )
        yield GaugeMetricFamily(
            "ogpu_callbacks_pending", "Callbacks that are to be delivered", self._undelivered()
        )
        workers = GaugeMetricFamily("ogpu_workers", "Slots, by state", labels=["state"])
        for state, count in self._pool.count_workers().items():
            workers.add_metric([state], count)
        yield workers
        yield from self._device_memory()

    def _device_memory(self) -> Iterator[Metric]:
        labels = ["slot", "device"]
        used = GaugeMetricFamily(
            "ogpu_device_memory_used_bytes",
            "Memory of a slot's GPU that is used, by whomever",
            labels=labels,
        )
        total = GaugeMetricFamily(
            "ogpu_device_memory_total_bytes", "Memory of a slot's GPU", labels=labels
        )
        for slot, device, used_bytes, total_bytes in self._pool.device_memory():
            used.add_metric([str(slot), device], used_bytes)
            total.add_metric([str(slot), device], total_bytes)
        if used.samples:  # else there is nothing to show
            yield used
            yield total
