"""The FastAPI application: routes, documentation, errors. Runs in the front.

Every handler has a documented route of its own; what answers there is the plain ASGI endpoint of
``run.py``. The function that FastAPI reads the documentation from is never called.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..config import SDK_VERSION, Settings
from ..handler import Handler
from ..journal import MemoryJournal
from ..pool.supervisor import Supervisor
from .health import Health
from .problem import Problem
from .run import RunEndpoint, Waiters
from .schema import Accepted, ProblemView, TaskView
from .tasks import TaskReader

_RUN_RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {"description": "Accepted: the task will end in one terminal state", "model": Accepted},
    404: {"description": "Unknown function", "model": ProblemView},
    409: {"description": "The task is active with another input", "model": ProblemView},
    413: {"description": "The body is larger than OGPU_MAX_BODY_BYTES", "model": ProblemView},
    503: {"description": "Draining, or the queue is full; see Retry-After", "model": ProblemView},
}


_TASK_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The task", "model": TaskView[BaseModel]},
    404: {"description": "Unknown task", "model": ProblemView},
    409: {"description": "Several functions have a task of this address", "model": ProblemView},
}
_TEXT = {"type": "string"}
_TASK_PARAMETERS: list[dict[str, Any]] = [
    {"name": "task_address", "in": "path", "required": True, "schema": _TEXT},
    {"name": "function", "in": "query", "required": False, "schema": _TEXT},
]


class Application:
    """The ASGI application: a short way to ``/run``, and FastAPI for everything else.

    FastAPI's middleware and routing took a third of the front's time for a task (a py-spy profile,
    concurrency 32), and ``/run`` needs none of it.
    """

    def __init__(
        self, app: FastAPI, endpoints: dict[str, RunEndpoint], unknown: RunEndpoint
    ) -> None:
        self.fastapi = app
        self._endpoints = endpoints
        self._unknown = unknown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            parts = scope["path"].split("/")
            if len(parts) == 4 and parts[1] == "run":
                endpoint = self._endpoints.get(parts[2], self._unknown)
                await endpoint(scope, receive, send)
                return
        await self.fastapi(scope, receive, send)


def create_app(
    settings: Settings,
    handlers: dict[str, Handler],
    journal: MemoryJournal,
    supervisor: Supervisor,
    waiters: Waiters,
) -> Application:
    """Build the application."""
    app = FastAPIOffline(
        title="OpenGPU Service",
        version=SDK_VERSION,
        description="POST a task to /run/{function}/{task_address}; GET it under /tasks.",
    )

    def endpoint(handler: Handler | None) -> RunEndpoint:
        timeout_s = (handler.timeout_s if handler else None) or settings.task_timeout
        return RunEndpoint(
            handler, timeout_s, settings.max_body_bytes, journal, supervisor, waiters
        )

    endpoints = {name: endpoint(handler) for name, handler in handlers.items()}
    for handler in handlers.values():
        _document_run(app, handler)
    health, reader = Health(supervisor), TaskReader(journal)
    _get(
        app,
        "/tasks/{task_address}",
        reader.get,
        "A task: its state, result or error",
        responses=_TASK_RESPONSES,
        parameters=_TASK_PARAMETERS,
    )
    _get(app, "/healthz", health.healthz, "Liveness: the event loop answers")
    _get(
        app,
        "/readyz",
        health.readyz,
        "Readiness: a task would run now; 503 with a reason if not",
        responses={503: {"description": "Starting, draining or broken", "model": ProblemView}},
    )
    _get(app, "/workers", health.workers, "The pool, slot by slot")
    app.add_exception_handler(HTTPException, _as_problem)
    return Application(app, endpoints, unknown=endpoint(None))


def _document_run(app: FastAPI, handler: Handler) -> None:
    async def described(task_address: str, data: object) -> None:
        """See ``Application``, which takes these requests before FastAPI does."""

    described.__doc__ = handler.function.__doc__
    described.__annotations__["data"] = handler.input_model
    app.add_api_route(
        f"/run/{handler.name}/{{task_address}}",
        described,
        methods=["POST"],
        status_code=202,
        name=handler.name,
        operation_id=f"run_{handler.name}",
        responses={
            200: {
                "description": "With `Prefer: wait=S`: the task, which ended within S seconds",
                "model": TaskView[handler.output_model],  # type: ignore[name-defined]  # a value
            },
            **_RUN_RESPONSES,
        },
        tags=["run"],
    )


def _get(
    app: FastAPI,
    path: str,
    call: Callable[[Request], Awaitable[Response]],
    summary: str,
    *,
    responses: dict[int | str, dict[str, Any]] | None = None,
    parameters: list[dict[str, Any]] | None = None,
) -> None:
    app.add_api_route(
        path,
        call,
        methods=["GET"],
        summary=summary,
        tags=["service"],
        responses=responses,
        openapi_extra={"parameters": parameters} if parameters else None,
    )


async def _as_problem(_: Request, error: Exception) -> Response:
    """Answer what the router refuses (404, 405) in the same shape as everything else."""
    assert isinstance(error, HTTPException)
    slug = error.detail.lower().replace(" ", "-")
    response = Problem(error.status_code, slug, error.detail).response(
        "This path or method does not exist here; see /docs."
    )
    response.headers.update(error.headers or {})
    return response
