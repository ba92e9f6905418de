"""A task as JSON. Runs in the front."""

from __future__ import annotations

from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from ..task import Task


def describe(task: Task) -> dict[str, Any]:
    """Return everything about a task but its result."""
    worker, error, callback, progress = task.worker, task.error, task.callback, task.progress
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
        "progress": progress and {"fraction": progress.fraction, "message": progress.message},
        "error": error and {**vars(error), "reason": error.reason.value},
        "callback": {
            "state": callback.state.value,
            "attempts": callback.attempts,
            "last_error": callback.last_error,
        },
    }


def task_json(task: Task) -> bytes:
    """Return a task as JSON; the result's bytes are the worker's, unread."""
    return b"".join(task_parts(task))


def task_parts(task: Task) -> list[bytes]:
    """Return a task as JSON, in parts: a large result is not copied."""
    head = to_json(describe(task))
    return [b'%b,"result":' % head[:-1], task.result or b"null", b"}"]


def task_response(task: Task, status: int = 200) -> Response:
    """Answer with a task."""
    return Response(task_json(task), status, media_type="application/json")
