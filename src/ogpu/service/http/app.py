"""The ASGI application: a short way to what is asked often, and FastAPI for everything else.

Runs in the front.

1. Without the key, where there is one: 401.
2. ``POST /run`` goes to the plain ASGI endpoint of ``run.py``. What arrives whole takes an even
   shorter way there (``Application.begin``).
3. The calls of ``health.py``, and those of ``tasks.py`` without a query, are called.
4. Anything else (a query, events, the documentation, what is not there) goes to FastAPI
   (``routes.py``). It is made for the first of these, beside the event loop: to import it takes
   0.1 s, of which a start has none, and 15 MB, which many services never need.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..config import Settings
from ..errors import JournalError
from ..handler import Handler
from .auth import KeyCheck
from .health import PoolCalls
from .problem import unavailable
from .protocol import Answer
from .rooms import Rooms
from .run import Reply, RunCall, RunEndpoint
from .tasks import TaskCalls, TaskFinder
from .whole import BegunRequest, Headers, WholeRequest

if TYPE_CHECKING:
    from fastapi import FastAPI

# A path that says what it means, without a query or escapes. An address that is none is answered
# by the endpoint.
_PATH = re.compile(rb"/run/(\w+)/([A-Za-z0-9._:-]+)")


class Routes:
    """FastAPI's application, from the first request on that needs it."""

    def __init__(self, make: Callable[[], FastAPI]) -> None:
        self._make = make
        self._making = asyncio.Lock()
        self._app: FastAPI | None = None

    async def get(self) -> FastAPI:
        """Return it; make it first, in a thread, where there is none yet."""
        if self._app is None:
            async with self._making:
                if self._app is None:
                    try:
                        self._app = await asyncio.to_thread(self._make)
                    except RuntimeError:  # no thread can be started: a task may have taken them
                        self._app = self._make()  # all, and is to be cancelled with this request
        return self._app


class Application:
    """The ASGI application.

    FastAPI's middleware and routing took a third of the front's time for a task (a py-spy profile,
    concurrency 32), and ``/run`` needs none of it.
    """

    def __init__(
        self,
        endpoints: dict[str, RunEndpoint],
        unknown: RunEndpoint,
        calls: tuple[PoolCalls, TaskCalls],
        routes: Routes,
        key: KeyCheck | None,
    ) -> None:
        self._endpoints = endpoints
        self._unknown = unknown
        pool, self._tasks = calls
        self._pool = pool.calls()
        self._routes = routes
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
        if scope["type"] == "http":
            response = None if self._key is None else self._key.refusal(scope)
            if response is None:
                endpoint = self._endpoint(scope)
                if endpoint is not None:
                    await endpoint(scope, receive, send)
                    return
                response = await self._called(scope)
            if response is not None:
                await response(scope, receive, send)
                return
        routes = await self._routes.get()
        await routes(scope, receive, send)

    async def _called(self, scope: Scope) -> Response | None:
        method, path = scope["method"], scope["path"]
        call = self._pool.get((method, path))
        if call is not None:
            return await call()
        answer = None if scope["query_string"] else self._tasks.plain(method, path)
        if answer is None:
            return None
        try:
            return await answer
        except JournalError as error:
            return unavailable(error)

    def _endpoint(self, scope: Scope) -> RunEndpoint | None:
        if scope["method"] != "POST":
            return None
        parts = scope["path"].split("/")
        if len(parts) != 4 or parts[1] != "run":
            return None
        return self._endpoints.get(parts[2], self._unknown)


def create_app(settings: Settings, handlers: dict[str, Handler], rooms: Rooms) -> Application:
    """Build the application."""

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

    pool = PoolCalls(rooms.supervisor, rooms.journal, rooms.metrics)
    finder = TaskFinder(rooms.journal)
    tasks = TaskCalls(finder, rooms.journal, rooms.supervisor, rooms.outbox)
    key = settings.api_key

    def make_routes() -> FastAPI:
        from .routes import create_routes  # noqa: PLC0415 - see the module's docstring

        calls = (pool, finder, tasks)
        return create_routes(handlers.values(), rooms, calls, needs_key=key is not None)

    return Application(
        {name: endpoint(handler) for name, handler in handlers.items()},
        unknown=endpoint(None),
        calls=(pool, tasks),
        routes=Routes(make_routes),
        key=None if key is None else KeyCheck(key.get_secret_value()),
    )
