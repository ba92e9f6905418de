"""The record of tasks: the one place where a task is accepted, changes its state and is found.

Runs in the front, on the event loop. This slice keeps tasks in memory; the methods are the ones
that a journal on disk needs, so ``accept`` is awaited before the 202 goes out. Each transition is
told to the listeners (callback, waiting requests, log lines), after it was recorded.

Tasks that are over (terminal, and no callback pending) are forgotten, oldest first, beyond a count
and a number of bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from .errors import TaskError
from .logger import logger
from .task import CallbackState, Task, TaskState, WorkerReference

Listener = Callable[[Task], None]

# A task costs about 1.5 kB besides its result; its input is dropped when it is over.
MAX_KEPT_TASKS = 10_000
MAX_KEPT_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended: with a result, or with an error."""

    state: TaskState
    result: bytes | None = None
    error: TaskError | None = None


class MemoryJournal:
    """Tasks in memory: lost with the process, which is said in the log at start."""

    durable = False

    def __init__(self) -> None:
        # By address: the newest task of each function that knows it, which is one nearly always.
        self._tasks: dict[str, list[Task]] = {}
        self._over: deque[tuple[Task, int]] = deque()
        self._over_bytes = 0
        self._listeners: list[Listener] = []

    def on_transition(self, listener: Listener) -> None:
        """Have ``listener`` called after every transition; it must not raise or block."""
        self._listeners.append(listener)

    async def accept(self, task: Task) -> None:
        """Record a new task. When this returns, the 202 may go out."""
        earlier = self.find(task.function, task.address)
        if earlier is not None:
            self._tasks[task.address].remove(earlier)
        self._tasks.setdefault(task.address, []).append(task)

    def find(self, function: str, address: str) -> Task | None:
        """Return the newest task of that name."""
        for task in self._tasks.get(address, ()):
            if task.function == function:
                return task
        return None

    def find_all(self, address: str) -> list[Task]:
        """Return the newest task of each function that knows this address."""
        return list(self._tasks.get(address, ()))

    def active_tasks(self) -> list[Task]:
        """Return the tasks that are not terminal or whose callback is pending."""
        return [task for tasks in self._tasks.values() for task in tasks if task.is_active]

    # --- transitions

    def start(self, task: Task, worker: WorkerReference, at: datetime) -> None:
        """Record that a worker was given the task; its clock runs from ``at``."""
        task.advance(TaskState.RUNNING)
        task.started_at = at
        task.worker = worker
        task.deadline = None if task.timeout_s is None else at + timedelta(seconds=task.timeout_s)
        self._tell(task)

    def requeue(self, task: Task) -> None:
        """Record that the worker was lost before it took the task."""
        task.advance(TaskState.QUEUED)
        task.started_at = task.worker = task.deadline = None
        self._tell(task)

    def finish(self, task: Task, outcome: Outcome) -> None:
        """Record how the task ended. The first end wins: later news is dropped, and logged."""
        if task.state.is_terminal:
            logger.warning(
                "[%s] `%s` had ended as %s already; dropped: %s",
                task.address,
                task.function,
                task.state.value,
                outcome.state.value,
            )
            return
        task.advance(outcome.state)
        task.finished_at = datetime.now(timezone.utc)
        task.result = outcome.result
        task.error = outcome.error
        self._tell(task)
        if not task.is_active:
            self._keep(task)

    # --- delivery

    def record_delivery(
        self, task: Task, state: CallbackState, *, error: str | None = None
    ) -> None:
        """Record where the delivery of the result is, and what went wrong with the last attempt."""
        task.callback.state = state
        task.callback.last_error = error
        if not task.is_active:
            self._keep(task)

    def _tell(self, task: Task) -> None:
        for listener in self._listeners:
            listener(task)

    def _keep(self, newest: Task) -> None:
        """Keep a task that is over for whoever asks, and forget the oldest ones for it."""
        newest.input = b""  # only a task that is active is compared with, or run again
        size = len(newest.result or b"")
        self._over.append((newest, size))
        self._over_bytes += size
        while len(self._over) > 1 and (
            len(self._over) > MAX_KEPT_TASKS or self._over_bytes > MAX_KEPT_BYTES
        ):
            oldest, size = self._over.popleft()
            self._over_bytes -= size
            # A later task of that name may stand in its place, and that one is not to be lost.
            tasks = self._tasks.get(oldest.address, [])
            if oldest in tasks:
                tasks.remove(oldest)
                if not tasks:
                    del self._tasks[oldest.address]
