"""What an earlier front has left, taken up by this one.

Runs in the front, once, before the port opens.

1. What waited is queued again, in the order of its acceptance.
2. What ran was interrupted: it runs again, as another attempt, unless OGPU_MAX_ATTEMPTS such
   attempts were lost. (What a drain cut short is not lost: it was queued again.)
3. What this source has no function for fails, and stops nothing. (An input that no longer fits its
   model fails in the worker, which validates again.)
"""

from __future__ import annotations

from datetime import datetime, timezone

from .config import Settings
from .errors import FailureReason, TaskError
from .handler import Handler
from .journal import Journal
from .logger import logger
from .outbox.receivers import lanes_of
from .pool.supervisor import Supervisor
from .task import Outcome, Task, TaskState


async def recover(
    journal: Journal, supervisor: Supervisor, handlers: dict[str, Handler], settings: Settings
) -> None:
    """Take up the tasks that have not ended.

    Raises:
        JournalError: the journal cannot be read.
    """
    tasks = await journal.recover()
    if tasks or journal.undelivered:
        logger.info(
            "Carrying on: %d task(s) that have not ended, %d callback(s) to deliver",
            len(tasks),
            journal.undelivered,
        )
    if journal.undelivered and not lanes_of(settings):
        logger.warning("There is nobody to deliver to: CALLBACK_URL is not set any more")
    for task in tasks:
        handler = handlers.get(task.function)
        failure = _why_not_again(task, handler, settings.max_attempts)
        if failure is not None or handler is None:
            journal.finish(task, Outcome(TaskState.FAILED, error=failure))
            continue
        task.timeout_s = handler.timeout_s or settings.task_timeout
        if task.state is TaskState.RUNNING:
            logger.warning(
                "[%s] `%s` was interrupted; it runs again (attempt %d)",
                task.address,
                task.function,
                task.attempt + 1,
            )
            journal.requeue(task, is_loss=True)
            supervisor.resubmit(task)
        else:
            waited = datetime.now(timezone.utc) - task.accepted_at
            supervisor.resubmit(task, waited_s=max(0.0, waited.total_seconds()))


def _why_not_again(task: Task, handler: Handler | None, max_attempts: int) -> TaskError | None:
    if handler is None:
        message = f"this source does not expose `{task.function}` any more"
        return TaskError(FailureReason.EXCEPTION, message, exception="UnknownFunction")
    if task.state is TaskState.RUNNING and task.losses + 1 >= max_attempts:
        message = (
            f"attempt {task.attempt} was interrupted by the end of the service, and "
            f"OGPU_MAX_ATTEMPTS={max_attempts} allows no other"
        )
        return TaskError(FailureReason.INTERRUPTED, message)
    return None
