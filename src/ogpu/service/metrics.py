"""What ``/metrics`` shows, in the words of Prometheus.

Runs in the front, and is counted in the front alone: a worker that is killed takes no figure along,
and leaves no file. Gauges are read when somebody asks; the rest is counted as it happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .task import Task, TaskState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A handler may take a millisecond or a night.
_TASK_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600, 4 * 3600, 12 * 3600,
)  # fmt: skip
_SHORT_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
_LAG_EVERY_S = 0.25


class Observed(Protocol):
    """Where the gauges are read."""

    @property
    def queue_depth(self) -> int:
        """How many tasks wait for a worker."""

    def count_workers(self) -> dict[str, int]:
        """Return how many slots are in each state."""


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
            "ogpu_task_run_seconds", "How long tasks ran", _TASK_BUCKETS_S, ("function",)
        )
        self._restarts = Counter(
            "ogpu_worker_restarts",
            "Workers that ended and were to be replaced, by reason",
            ("reason",),
            registry=self._registry,
        )
        self._init_s = self._histogram("ogpu_init_seconds", "How long @init took", _TASK_BUCKETS_S)
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
        # `labels()` looks a child up under a lock; on the hot path it is looked up once.
        self._ends: dict[tuple[str, TaskState, str], Counter] = {}
        self._runs: dict[str, Histogram] = {}

    def _histogram(
        self, name: str, help_text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        return Histogram(name, help_text, labels, buckets=buckets, registry=self._registry)

    # --- what happens

    def on_transition(self, task: Task) -> None:
        """Count a transition (a listener of the journal)."""
        if task.state is TaskState.RUNNING:
            # A later attempt waited for its first one, too, which is no time in the queue.
            if task.attempt == 1 and task.started_at is not None:
                self._queue_s.observe((task.started_at - task.accepted_at).total_seconds())
        elif task.state.is_terminal:
            self._count_end(task)

    def _count_end(self, task: Task) -> None:
        reason = task.error.reason.value if task.error else ""
        key = (task.function, task.state, reason)
        ends = self._ends.get(key)
        if ends is None:
            ends = self._tasks.labels(task.function, task.state.value, reason)
            self._ends[key] = ends
        ends.inc()
        if task.started_at is None or task.finished_at is None:
            return
        runs = self._runs.get(task.function)
        if runs is None:
            runs = self._runs[task.function] = self._run_s.labels(task.function)
        runs.observe((task.finished_at - task.started_at).total_seconds())

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
        """Measure, until cancelled, how late the event loop is."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self._lag_s.observe(max(0.0, loop.time() - due))

    # --- what is asked

    def observe(self, pool: Observed, undelivered: Callable[[], int]) -> None:
        """Say where the gauges are read."""
        self._registry.register(_Gauges(pool, undelivered))

    def render(self) -> bytes:
        """Return all of it, in the text format of Prometheus."""
        return generate_latest(self._registry)


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
