"""The FastAPI application: routes, documentation, errors. Runs in the front.

Every handler has a documented route of its own; what answers there is the plain ASGI endpoint of
``run.py``. The function that FastAPI reads the documentation from is never called.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from ..config import SDK_VERSION, Settings
from ..errors import JournalError
from ..events import TaskEvents
from ..handler import Handler
from ..journal import Journal
from ..metrics import Metrics
from ..pool.supervisor import Supervisor
from . import schema
from .auth import KeyCheck
from .events import EventCalls
from .health import PoolCalls
from .problem import JOURNAL_UNAVAILABLE, Problem
from .protocol import Answer
from .run import Reply, RunCall, RunEndpoint
from .tasks import TaskCalls, TaskFinder
from .waiters import Waiters
from .whole import BegunRequest, Headers, WholeRequest

if TYPE_CHECKING:
    from ..outbox.outbox import Outbox


@dataclass(frozen=True)
class Rooms:
    """What the calls look at and act on."""

    journal: Journal
    supervisor: Supervisor
    outbox: Outbox | None
    events: TaskEvents
    metrics: Metrics
    waiters: Waiters


# A path that says what it means, without a query or escapes. An address that is none is answered
# by the endpoint.
_PATH = re.compile(rb"/run/(\w+)/([A-Za-z0-9._:-]+)")


class Application:
    """The ASGI application: a short way to ``/run``, and FastAPI for everything else.

    What arrives whole takes an even shorter one (``begin``). FastAPI's middleware and routing took
    a third of the front's time for a task (a py-spy profile, concurrency 32), and ``/run`` needs
    none of it.
    """

    def __init__(
        self,
        app: FastAPI,
        endpoints: dict[str, RunEndpoint],
        unknown: RunEndpoint,
        key: KeyCheck | None,
    ) -> None:
        self.fastapi = app
        self._endpoints = endpoints
        self._unknown = unknown
        self._key = key

    def expects(self, begun: BegunRequest) -> bool:
        """Tell whether the rest of a POST to ``/run`` is wanted; else it is answered early."""
        found = self._find(begun.target, begun.headers)
        return found is not None and found[0].has_room_for(len(begun.body) + begun.missing)

    def begin(self, request: WholeRequest, reply: Reply) -> Answer | RunCall | None:
        """Take a POST to ``/run`` that arrived whole (``RunEndpoint.begin``); None: call this."""
        found = self._find(request.target, request.headers)
        return None if found is None else found[0].begin(found[1], request, reply)

    def _find(self, target: bytes, headers: Headers) -> tuple[RunEndpoint, str] | None:
        """Return the endpoint and the address; None: it is one for the long way."""
        if self._key is not None and not self._key.is_in(headers.get(b"authorization", b"")):
            return None
        match = _PATH.fullmatch(target)
        if match is None:
            return None
        endpoint = self._endpoints.get(match[1].decode())
        return None if endpoint is None else (endpoint, match[2].decode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._key is not None and scope["type"] == "http":
            refusal = self._key.refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        if scope["type"] == "http" and scope["method"] == "POST":
            parts = scope["path"].split("/")
            if len(parts) == 4 and parts[1] == "run":
                endpoint = self._endpoints.get(parts[2], self._unknown)
                await endpoint(scope, receive, send)
                return
        await self.fastapi(scope, receive, send)


def create_app(settings: Settings, handlers: dict[str, Handler], rooms: Rooms) -> Application:
    """Build the application."""
    app = FastAPIOffline(
        title="OpenGPU Service",
        redirect_slashes=False,
        version=SDK_VERSION,
        description="POST a task to /run/{function}/{task_address}; GET it under /tasks.",
    )

    def endpoint(handler: Handler | None) -> RunEndpoint:
        timeout_s = (handler.timeout_s if handler else None) or settings.task_timeout
        return RunEndpoint(
            handler,
            timeout_s,
            settings.max_body_bytes,
            rooms.journal,
            rooms.supervisor,
            rooms.waiters,
        )

    endpoints = {name: endpoint(handler) for name, handler in handlers.items()}
    for handler in handlers.values():
        _document_run(app, handler)
    _add_calls(app, rooms)
    app.add_exception_handler(HTTPException, _as_problem)
    app.add_exception_handler(JournalError, _as_unavailable)
    key = settings.api_key
    schema.complete(app, needs_key=key is not None)
    return Application(
        app,
        endpoints,
        unknown=endpoint(None),
        key=None if key is None else KeyCheck(key.get_secret_value()),
    )


def _add_calls(app: FastAPI, rooms: Rooms) -> None:
    finder = TaskFinder(rooms.journal)
    tasks = TaskCalls(finder, rooms.journal, rooms.supervisor, rooms.outbox)
    events = EventCalls(finder, rooms.journal, rooms.supervisor, rooms.events)
    pool = PoolCalls(rooms.supervisor, rooms.journal, rooms.metrics)
    one = "/tasks/{task_address}"
    _add(app, "GET", "/tasks", tasks.page, schema.PAGE)
    _add(app, "GET", one, tasks.get, schema.TASK)
    _add(app, "DELETE", one, tasks.cancel, schema.CANCELLED)
    _add(app, "GET", f"{one}/events", events.watch, schema.EVENTS)
    _add(app, "GET", f"{one}/logs", tasks.logs, schema.LOGS)
    _add(app, "POST", f"{one}/callback", tasks.callback, schema.SENT_AGAIN, status=202)
    _add(app, "GET", "/healthz", pool.healthz, {})
    _add(app, "GET", "/readyz", pool.readyz, schema.READY)
    _add(app, "GET", "/workers", pool.workers, schema.POOL)
    _add(app, "POST", "/drain", pool.drain, schema.POOL)
    _add(app, "POST", "/resume", pool.resume, schema.RESUMED)
    _add(app, "GET", "/metrics", pool.metrics, schema.METRICS)


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
    detail = str(error)
    return JOURNAL_UNAVAILABLE.response(
        detail[:1].upper() + detail[1:] + "; try again later.", retry_after_s=1
    )
