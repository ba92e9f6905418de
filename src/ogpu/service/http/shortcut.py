"""The short way to ``/run``: a request that arrived whole is answered without a coroutine.

Runs in the front. An asyncio task, a cycle of ASGI messages and two events for each request are
most of what an HTTP framework costs: 60 of 70 µs (one CPU, a handler that does nothing).

1. The connection rests, and what arrives starts with ``POST /run/``: it is parsed (``whole.py``).
2. It is all there and nothing unusual: the endpoint takes it, and answers now or later. Whatever is
   not for this way goes to uvicorn's protocol, with the same bytes, before anything has happened.
3. What the client sends before it has its answer waits, and is not read any further.
4. The client goes away: nobody is answered, and the task goes on.
"""

from __future__ import annotations

from collections.abc import Callable

from .clients import ClientLimits, Clients, LimitedProtocol
from .protocol import Answer, OneWriteProtocol, encoded, header_lines
from .run import Reply, RunCall
from .whole import WholeReader, WholeRequest

Begin = Callable[[WholeRequest, Reply], Answer | RunCall | None]

_START = b"POST /run/"


class Shortcut:
    """What the connections of a server share: the way to the endpoints, a parser, a few lines."""

    def __init__(self, begin: Begin) -> None:
        self.begin = begin
        self.reader = WholeReader()
        self._headers: list[tuple[bytes, bytes]] = []
        self._lines = b""

    def common_lines(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Return what uvicorn puts into each answer; it makes another list each second (Date)."""
        if headers is not self._headers:
            self._headers, self._lines = headers, header_lines(headers)
        return self._lines


def shortcut_protocol(limits: ClientLimits, begin: Begin) -> type[OneWriteProtocol]:
    """Return the protocol class of a server, for uvicorn to instantiate."""

    class Served(ShortcutProtocol):
        clients = Clients(limits)
        shortcut = Shortcut(begin)

    return Served


class ShortcutProtocol(LimitedProtocol):
    """uvicorn's protocol with a short way."""

    shortcut: Shortcut
    _is_taken = False  # a request is being answered here
    _call: RunCall | None = None
    _held = b""  # what came before its answer had gone
    _rests_since = 0.0
    _is_last = False

    def data_received(self, data: bytes) -> None:
        if self._is_taken or self._held:
            self._held += data
            self.transport.pause_reading()
        elif not (data.startswith(_START) and self.is_resting and self._take(data)):
            LimitedProtocol.data_received(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._call is not None:
            self._call.leave()
            self._call = None
        super().connection_lost(exc)

    def _take(self, data: bytes) -> bool:
        request = self.shortcut.reader.read(data)
        if request is None or len(data) - len(request.body) > self.clients.max_header_bytes:
            return False
        begun = self.shortcut.begin(request, self._reply)
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
        if self._is_taken:
            return  # its answer starts the clock again
        if left_s > 0:
            self._watch_rest(left_s)
        else:
            super().timeout_keep_alive_handler()

    def _watch_rest(self, left_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(left_s, self.timeout_keep_alive_handler)

    def shutdown(self) -> None:
        if self._is_taken:
            self._is_last = True
        else:
            super().shutdown()
