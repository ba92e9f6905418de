"""Tasks as rows, and back. Pure functions.

A row is what the tables hold of a task, in the order of ``TASK_COLUMNS``; times are seconds since
1970. Each column costs a search in the row's JSON when it is written, so what no statement asks for
is one column, ``details``, as text that SQLite need not read; and what can be told from the state
of the callback is not in the row that is written, but in the statement (``schema.BATCH``).
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from pydantic_core import from_json, to_json

from ..errors import FailureReason, TaskError
from ..task import (
    Callback,
    CallbackState,
    Progress,
    Task,
    TaskState,
    WorkerReference,
)
from .deliveries import Lane

Row = tuple[Any, ...]


def row_of(task: Task) -> Row:
    """Return a task's row, up to the callback; of one that is pending the lane follows."""
    worker = task.worker
    details = (
        task.accepted_at.timestamp(),
        _seconds(task.started_at),
        _seconds(task.deadline),
        task.losses,
        worker and (worker.slot, worker.generation, worker.pid, worker.device),
        task.progress and (task.progress.fraction, _clean(task.progress.message)),
        task.error and {name: _clean(value) for name, value in asdict(task.error).items()},
        _clean(task.output),
    )
    return (
        task.number,
        task.function,
        task.address,
        task.state.value,
        task.attempt,
        _seconds(task.finished_at),
        to_json(details).decode(),
        0 if task.result is None else len(task.result),
        *((Lane.first_of(task.state).value,) if is_pending(task) else ()),
    )


def is_pending(task: Task) -> bool:
    """Return whether the task's callback is yet to be delivered."""
    return task.callback.state is CallbackState.PENDING


def task_of(row: Row, journal_id: str, result: bytes | None = None) -> Task:
    """Return the task that a row describes; its input stays in the journal."""
    number, function, address, state, attempt, finished_at, details, _, callback, _, *more = row
    attempts, last_error, *_ = more
    accepted_at, started_at, deadline, losses, worker, progress, error, output = from_json(details)
    return Task(
        number=number,
        id=task_id(journal_id, number),
        function=function,
        address=address,
        input=None,
        state=TaskState(state),
        attempt=attempt,
        losses=losses,
        accepted_at=datetime.fromtimestamp(accepted_at, timezone.utc),
        started_at=_moment(started_at),
        finished_at=_moment(finished_at),
        deadline=_moment(deadline),
        worker=worker and WorkerReference(*worker),
        progress=progress and Progress(*progress),
        result=result,
        error=error and _error_of(error),
        output=output,
        callback=Callback(CallbackState(callback), attempts, last_error),
    )


def task_id(journal_id: str, number: int) -> str:
    """Return the id of a task, which no other task has, in this journal or another."""
    return f"task_{journal_id}_{number}"


def _error_of(fields: dict[str, Any]) -> TaskError:
    try:
        reason = FailureReason(fields["reason"])
    except ValueError:  # of a newer version of this package
        reason = FailureReason.EXCEPTION
    return TaskError(**{**fields, "reason": reason})


def _clean(value: Any) -> Any:  # noqa: ANN401 - what a field of an error may be
    """Return a text with what UTF-8 can say; one lone surrogate would spoil a whole commit."""
    return value.encode("utf-8", "backslashreplace").decode() if type(value) is str else value


def _seconds(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
