"""A task as JSON, and ``GET /tasks/{task_address}``. Runs in the front."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from ..journal import MemoryJournal
from ..task import Task
from .problem import AMBIGUOUS_TASK, UNKNOWN_TASK


def describe(task: Task) -> dict[str, Any]:
    """Return everything about a task but its result."""
    worker, error, callback = task.worker, task.error, task.callback
    return {
        "task_address": task.address,
        "function": task.function,
        "state": task.state.value,
        "attempt": task.attempt,
        "accepted_at": task.accepted_at,
        "started_at": task.started_at,
        "finished_at": task.finished_at,
        "deadline": task.deadline,
        "worker": worker
        and {
            "slot": worker.slot,
            "generation": worker.generation,
            "pid": worker.pid,
            "device": worker.device,
        },
        "progress": None,
        "error": error and {**vars(error), "reason": error.reason.value},
        "callback": {
            "state": callback.state.value,
            "attempts": callback.attempts,
            "last_error": callback.last_error,
        },
    }


def task_json(task: Task) -> bytes:
    """Return a task as JSON; the result's bytes are the worker's, unread."""
    head = to_json(describe(task))
    return b'%b,"result":%b}' % (head[:-1], task.result or b"null")


class TaskReader:
    """``GET /tasks/{task_address}``, with ``?function=`` where one address serves several."""

    def __init__(self, journal: MemoryJournal) -> None:
        self._journal = journal

    async def get(self, request: Request) -> Response:
        address = request.path_params["task_address"]
        function = request.query_params.get("function")
        found = [
            task
            for task in self._journal.find_all(address)
            if function is None or task.function == function
        ]
        if not found:
            return UNKNOWN_TASK.response(
                f"No task `{address}` is known here; it may be too old, or was never accepted."
            )
        if len(found) > 1:
            names = ", ".join(sorted(task.function for task in found))
            return AMBIGUOUS_TASK.response(f"Add ?function= with one of: {names}.")
        return Response(task_json(found[0]), media_type="application/json")
