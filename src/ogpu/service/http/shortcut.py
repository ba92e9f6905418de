"""The short way to ``/run``: a request is taken and answered without a coroutine.

Runs in the front. An asyncio task, a cycle of ASGI messages and two events for each request are
most of what an HTTP framework costs: FastAPI takes 130 to 145 µs of a core for an echo, and a bare
protocol of uvloop with httptools 9.

1. The connection rests, and what arrives starts with ``POST /run/``: it is parsed (``whole.py``).
   Where some of the body is missing, that is gathered, under the same limits as on the long way.
2. It is all there and nothing unusual: the endpoint takes it, and answers now or later. Whatever is
   not for this way goes to uvicorn's protocol, with the same bytes, before anything has happened.
3. What the client sends before it has its answer waits, and is not read any further.
4. The client goes away: nobody is answered, and the task goes on.
"""

from __future__ import annotations

from typing import Protocol

from .clients import ClientLimits, Clients, LimitedProtocol
from .protocol import Answer, OneWriteProtocol, encoded, header_lines
from .run import Reply, RunCall
from .whole import BegunRequest, WholeReader, WholeRequest


class Takes(Protocol):
    """Who takes requests (``Application``)."""

    def expects(self, begun: BegunRequest) -> bool:
        """Tell whether the rest of a request is wanted; it is not where it will be refused."""

    def begin(self, request: WholeRequest, reply: Reply) -> Answer | RunCall | None:
        """Take a request (``RunEndpoint.begin``); None: it is one for the long way."""


_START = b"POST /run/"


class Shortcut:
    """What the connections of a server share: who takes requests, a parser, a few lines."""

    def __init__(self, application: Takes) -> None:
        self.application = application
        self.reader = WholeReader()
        self._headers: list[tuple[bytes, bytes]] = []
        self._lines = b""

    def common_lines(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Return what uvicorn puts into each answer; it makes another list each second (Date)."""
        if headers is not self._headers:
            self._headers, self._lines = headers, header_lines(headers)
        return self._lines


def shortcut_protocol(limits: ClientLimits, application: Takes) -> type[OneWriteProtocol]:
    """Return the protocol class of a server, for uvicorn to instantiate."""

    class Served(ShortcutProtocol):
        clients = Clients(limits)
        shortcut = Shortcut(application)

    return Served


class _Gathering:
    """A request whose body is arriving."""

    def __init__(self, head: bytes, begun: BegunRequest) -> None:
        self.head = head
        self._begun = begun
        self._parts = [begun.body]
        self._missing = begun.missing

    def add(self, data: bytes) -> tuple[WholeRequest, bytes] | None:
        """Take what has arrived; return the request, once it is whole, and what came after it."""
        self._missing -= len(data)
        self._parts.append(data)
        if self._missing > 0:
            return None
        rest = b""
        if self._missing < 0:
            self._parts[-1], rest = data[: self._missing], data[self._missing :]
        target, headers, _, _ = self._begun
        return WholeRequest(target, headers, b"".join(self._parts)), rest


class ShortcutProtocol(LimitedProtocol):
    """uvicorn's protocol with a short way."""

    shortcut: Shortcut
    _gathering: _Gathering | None = None  # a request whose body is arriving
    _is_taken = False  # one that is being answered here
    _call: RunCall | None = None
    _held = b""  # what came before its answer had gone
    _rests_since = 0.0
    _is_last = False

    def data_received(self, data: bytes) -> None:
        if self._is_taken or self._held:
            self._held += data
            self.transport.pause_reading()
        elif self._gathering is not None and self._refusal is None:
            self._gather(self._gathering, data)
        elif not (data.startswith(_START) and self.is_resting and self._take(data)):
            LimitedProtocol.data_received(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._call is not None:
            self._call.leave()
            self._call = None
        super().connection_lost(exc)

    def _take(self, data: bytes) -> bool:
        """Take a request, or the beginning of one; return False where it is not for this way."""
        request = self.shortcut.reader.read(data)
        if request is None:
            return False
        head_bytes = len(data) - len(request.body)
        if head_bytes > self.clients.max_header_bytes:
            return False
        if isinstance(request, WholeRequest):
            return self._begin(request)
        if not self.shortcut.application.expects(request):
            return False
        self._gathering = _Gathering(data[:head_bytes], request)
        self.begin_arriving()
        return True

    def _gather(self, gathering: _Gathering, data: bytes) -> None:
        whole = gathering.add(data)
        if whole is None:
            return
        request, self._held = whole
        self._gathering = None
        self.end_arriving()
        if not self._begin(request):
            held, self._held = self._held, b""
            LimitedProtocol.data_received(self, gathering.head + request.body + held)

    def _begin(self, request: WholeRequest) -> bool:
        begun = self.shortcut.application.begin(request, self._reply)
        if begun is None:
            return False
        self._is_taken = True
        self.begin_answering()
        if isinstance(begun, RunCall):
            self._call = begun
        else:
            self._reply(begun)
        return True

    def _reply(self, answer: Answer) -> None:
        self._is_taken, self._call = False, None
        lines = self.shortcut.common_lines(self.server_state.default_headers)
        self.write_now(encoded(answer, lines))
        self.end_answering()
        if self._is_last:
            self.transport.close()
            return
        self._rests_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._watch_rest(self.timeout_keep_alive)
        if self._held:  # not at once: this may be within a step of the pool
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        held, self._held = self._held, b""
        if not self.transport.is_closing():
            self.transport.resume_reading()
            self.data_received(held)

    # --- uvicorn's own ends of a connection

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that rests; one timer for many requests, so it may be too early."""
        self.timeout_keep_alive_task = None
        left_s = self._rests_since + self.timeout_keep_alive - self.loop.time()
        if self._is_taken or self._gathering is not None:
            return  # its answer starts the clock again
        if left_s > 0:
            self._watch_rest(left_s)
        else:
            super().timeout_keep_alive_handler()

    def _watch_rest(self, left_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(left_s, self.timeout_keep_alive_handler)

    def shutdown(self) -> None:
        if self._is_taken or self._gathering is not None:
            self._is_last = True
        else:
            super().shutdown()
