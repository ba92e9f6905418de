"""The log lines about tasks: how each ended, and what becomes of those that have not.

Runs in the front. The words are those of the frozen module.
"""

from __future__ import annotations

import asyncio

from .journal import Journal
from .logger import log_successes, logger
from .task import Task, TaskState

_BATCH_S = 0.02


class EndReporter:
    """Says how tasks ended (a listener of the journal).

    Successes are said a moment later, many at a time: said one by one, each between two steps of
    the hot path, they took the front 15 of its 100 µs for a task.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._succeeded: list[str] = []

    def on_end(self, task: Task) -> None:
        """Take notice of an end."""
        if task.state is TaskState.SUCCEEDED:
            if not self._succeeded:
                self._loop.call_later(_BATCH_S, self.flush)
            self._succeeded.append(
                f"[{task.address}] Function: `{task.function}` completed successfully"
            )
        elif task.state in (TaskState.TIMED_OUT, TaskState.FAILED):
            self.flush()
            _report_failure(task)
        else:
            assert task.error is not None
            logger.warning("[%s] %s", task.address, task.error.message)

    def flush(self) -> None:
        """Say what has not been said."""
        succeeded, self._succeeded = self._succeeded, []
        if succeeded:
            log_successes(succeeded)


def _report_failure(task: Task) -> None:
    error = task.error
    assert error is not None
    details = f"\n{error.traceback.rstrip()}" if error.traceback else ""
    if error.stack:
        details += f"; it was here:\n{error.stack.rstrip()}"
    if task.state is TaskState.TIMED_OUT:
        logger.task_timeout("[%s] %s%s", task.address, error.message, details)
        return
    logger.task_fail(
        "[%s] Error in `%s`: %s%s", task.address, task.function, error.message, details
    )


def report_left(journal: Journal) -> None:
    """Say what has not ended: kept for the next start, or lost where the journal is in memory."""
    tasks = journal.unfinished()
    if journal.durable:
        if tasks or journal.undelivered:
            logger.info(
                "%d task(s) and %d callback(s) stay in the journal for the next start",
                len(tasks),
                journal.undelivered,
            )
        return
    for task in tasks:
        logger.error(
            "[%s] `%s` is lost: it was %s when the service stopped",
            task.address,
            task.function,
            task.state.value,
        )
    if journal.undelivered:
        logger.error("%d callback(s) are lost: they were not delivered", journal.undelivered)
