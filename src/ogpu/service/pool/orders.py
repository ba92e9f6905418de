"""Orders: a task, as it is put to a worker. Each has a number of its own, so that answers match.

Runs in the front, on its event loop.
"""

from __future__ import annotations

from .. import wire
from ..task import Task


class Orders:
    """Makes orders. ``graces_s`` are the seconds after a deadline, by function."""

    def __init__(self, graces_s: dict[str, float]) -> None:
        self._graces_s = graces_s
        self._runs = 0
        self._to_be_stored: set[int] = set()  # numbers of tasks of an earlier front

    def with_deadline(
        self, task: Task, deadline_at: float | None, deadline_s: float | None, more: int
    ) -> tuple[wire.Run, bytes]:
        """Return the order, and the input, of a task whose clock runs; ``more`` run with it."""
        assert task.input is not None
        may_be_asked = self._graces_s[task.function] > 0
        order = wire.Run(
            self._next_run(),
            task.function,
            task.address,
            task.attempt,
            deadline_at,
            deadline_s,
            may_be_asked,
            more,
        )
        return order, task.input

    def ahead(self, task: Task) -> tuple[wire.Run, bytes]:
        """Return the order, and the input, of a task whose clock starts when it is taken."""
        assert task.input is not None
        order = wire.Run(
            self._next_run(),
            task.function,
            task.address,
            task.attempt,
            None,
            None,
            may_be_asked=False,
            timeout_s=task.timeout_s,
        )
        return order, task.input

    def _next_run(self) -> int:
        self._runs += 1
        return self._runs

    # --- tasks that an earlier front may have been killed by

    def note_recovered(self, task: Task) -> None:
        """Take notice that a task is of an earlier front."""
        self._to_be_stored.add(task.number)

    def must_be_stored(self, task: Task) -> bool:
        """Tell whether it has to be recorded that a task runs, before it does."""
        return bool(self._to_be_stored) and task.number in self._to_be_stored

    def forget_recovered(self, tasks: list[Task]) -> None:
        """Take notice that it is being recorded that tasks run."""
        self._to_be_stored.difference_update([task.number for task in tasks])
