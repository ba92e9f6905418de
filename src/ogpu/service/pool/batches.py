"""Which tasks run together: one, or a batch of one function.

Runs in the front, on its event loop; the dispatcher asks it when a worker is free.

1. The functions are looked at in the order of their first waiting tasks.
2. A handler without batching takes one. One with batching takes what waits, ``batch_size`` at most.
   Where fewer wait, the first of them waits for others until its window closes; other functions
   have the worker meanwhile. At the end of the service no window is open.
3. A batch has killed its worker: nobody knows which task did, so that each runs alone from then on.
   So does a task that was lost in another way (with its front, or its template), in its last
   attempt: who kills those would use up OGPU_MAX_ATTEMPTS for its whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import takewhile

from ..config import Settings
from ..handler import Batching, Handler
from ..task import Task
from .background import Background
from .queue import TaskQueue


class Batches:
    """Takes tasks out of the queue. ``on_window_closed`` is called when it is to be asked again."""

    def __init__(
        self,
        queue: TaskQueue,
        handlers: dict[str, Handler],
        background: Background,
        on_window_closed: Callable[[], None],
        settings: Settings,
    ) -> None:
        self._queue = queue
        self._batchings = {name: handler.batching for name, handler in handlers.items()}
        # A task that waits for others, while a worker is free, is not to expire of it.
        self._longest_window_s = (settings.queue_timeout or math.inf) / 2
        self._max_attempts = settings.max_attempts
        self._queue_size = settings.queue_size
        self._background = background
        self._on_window_closed = on_window_closed
        self._is_last = False  # nobody else will come
        self._suspects: set[int] = set()  # numbers of tasks whose batch killed its worker
        self._windows: set[str] = set()  # functions whose first task waits for others

    def take(self) -> list[Task]:
        """Take the tasks that run next, all of one function; none: there are none, for now."""
        for first in self._queue.heads():
            batching = self._batchings.get(first.function)
            if batching is None or self._is_suspect(first):
                return self._queue.take([first])
            together = self._with(first, batching)
            if together:
                return self._queue.take(together)
        return []

    def next_alone(self) -> Task | None:
        """Return the task that is first in line, if it is one that runs alone."""
        first = next(iter(self._queue.heads()), None)
        if first is None or self._batchings.get(first.function) is not None:
            return None
        return first

    def has(self, function: str) -> bool:
        """Tell whether tasks of a function may run together."""
        return self._batchings.get(function) is not None

    def separate(self, tasks: list[Task]) -> None:
        """Have tasks run alone."""
        self._suspects.update(task.number for task in tasks)

    def close_windows(self) -> None:
        """Let no task wait for others any more: nothing more is accepted."""
        self._is_last = True

    def forget(self, task: Task) -> None:
        """Take notice that a task has ended."""
        self._suspects.discard(task.number)

    def _with(self, first: Task, batching: Batching) -> list[Task]:
        """Return a task and those that run with it; none: it waits for others."""
        waiting = self._queue.first_of(first.function, batching.size)
        most = min(batching.size, self._queue_size)  # more are not accepted
        if len(waiting) < most and not self._is_last:
            window_s = min(batching.window_s, self._longest_window_s)
            open_s = first.queued_s + window_s - self._queue.now_s()
            if open_s > 0:
                self._ask_again(first.function, open_s)
                return []
        return list(takewhile(lambda task: not self._is_suspect(task), waiting))

    def _is_suspect(self, task: Task) -> bool:
        is_last_attempt = task.losses > 0 and task.losses + 1 >= self._max_attempts
        return is_last_attempt or task.number in self._suspects

    def _ask_again(self, function: str, open_s: float) -> None:
        # One timer at a time: that of an earlier first task rings too early, and is set again.
        if function not in self._windows:
            self._windows.add(function)
            self._background.call_later(open_s, self._on_timer, function)

    def _on_timer(self, function: str) -> None:
        self._windows.discard(function)
        self._on_window_closed()
