"""The FastAPI application: routes, documentation, errors. Runs in the front.

It is made when the first request comes that needs it (``app.py``), in a thread. Every handler has a
documented route of its own; what answers there is the plain ASGI endpoint of ``run.py``. The
function that FastAPI reads the documentation from is never called.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from ..config import SDK_VERSION
from ..errors import JournalError
from ..handler import Handler
from . import schema
from .events import EventCalls
from .health import PoolCalls
from .problem import Problem, unavailable
from .rooms import Rooms
from .tasks import TaskCalls, TaskFinder


def create_routes(
    handlers: Iterable[Handler],
    rooms: Rooms,
    calls: tuple[PoolCalls, TaskFinder, TaskCalls],
    *,
    needs_key: bool,
) -> FastAPI:
    """Build FastAPI's application."""
    app = FastAPIOffline(
        title="OpenGPU Service",
        redirect_slashes=False,
        version=SDK_VERSION,
        description="POST a task to /run/{function}/{task_address}; GET it under /tasks.",
    )
    for handler in handlers:
        _document_run(app, handler)
    _add_calls(app, rooms, calls)
    app.add_exception_handler(HTTPException, _as_problem)
    app.add_exception_handler(JournalError, _as_unavailable)
    schema.complete(app, needs_key=needs_key)
    return app


def _add_calls(app: FastAPI, rooms: Rooms, calls: tuple[PoolCalls, TaskFinder, TaskCalls]) -> None:
    pool, finder, tasks = calls
    events = EventCalls(finder, rooms.journal, rooms.supervisor, rooms.events)
    one = "/tasks/{task_address}"
    _add(app, "GET", "/tasks", tasks.page, schema.PAGE)
    _add(app, "GET", one, tasks.get, schema.TASK)
    _add(app, "DELETE", one, tasks.cancel, schema.CANCELLED)
    _add(app, "GET", f"{one}/events", events.watch, schema.EVENTS)
    _add(app, "GET", f"{one}/logs", tasks.logs, schema.LOGS)
    _add(app, "POST", f"{one}/callback", tasks.callback, schema.SENT_AGAIN, status=202)
    for (method, path), call in pool.calls().items():
        _add(app, method, path, call, schema.OF_POOL_CALLS[path])


def _add(
    app: FastAPI,
    method: str,
    path: str,
    call: Callable[..., Awaitable[Response]],
    responses: schema.Responses,
    *,
    status: int = 200,
) -> None:
    app.add_api_route(
        path,
        call,
        methods=[method],
        status_code=status,
        response_model=None,
        responses=responses,
        tags=["tasks" if path.startswith("/tasks") else "service"],
    )


def _document_run(app: FastAPI, handler: Handler) -> None:
    async def described(task_address: schema.Address, data: object) -> None:
        """See ``Application``, which takes these requests before FastAPI does."""

    described.__doc__ = handler.function.__doc__
    described.__annotations__["data"] = handler.input_model
    described.__annotations__["task_address"] = schema.Address
    parameters: dict[str, Any] = {"parameters": [schema.PREFER]}
    app.add_api_route(
        f"/run/{handler.name}/{{task_address}}",
        described,
        methods=["POST"],
        status_code=202,
        name=handler.name,
        operation_id=f"run_{handler.name}",
        responses=schema.run_responses(handler.output_model),
        openapi_extra=parameters,
        tags=["run"],
    )


async def _as_problem(request: Request, error: Exception) -> Response:
    """Answer what the router refuses (404, 405) in the same shape as everything else."""
    assert isinstance(error, HTTPException)
    slug = error.detail.lower().replace(" ", "-")
    response = Problem(error.status_code, slug, error.detail).response(
        "This path or method does not exist here; see /docs."
    )
    response.headers.update(error.headers or {})
    if error.status_code == 405:  # the router names the methods of one route, not of the path
        routes = (r for r in request.app.routes if r.matches(request.scope)[0] is not Match.NONE)
        methods = {method for route in routes for method in route.methods or ()}
        response.headers["allow"] = ", ".join(sorted(methods))
    return response


async def _as_unavailable(_: Request, error: Exception) -> Response:
    assert isinstance(error, JournalError)
    return unavailable(error)
