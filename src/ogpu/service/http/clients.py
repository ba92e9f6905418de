"""Limits on what clients may take of the front: time, bytes of a head, connections.

Runs in the front. A client is held to ``ClientLimits``, in three places:

1. ``data_received`` feeds the parser no more of a head than is allowed.
2. ``_check``, one timer a connection, cuts a request that does not arrive. Its clock stands while
   a request that did arrive is being answered, however long that takes.
3. ``Clients.admit`` makes room for a newcomer at the cost of who has waited longest.
"""

from __future__ import annotations

import asyncio
import math
import resource
from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import Response

from ..logger import logger
from .problem import Problem
from .protocol import OneWriteProtocol, encoded, header_lines

_LINGER_S = 1.0
_RETRY_AFTER_S = 5
_WARN_EVERY_S = 1.0
# What the front has open besides its clients: listener, workers, callbacks, libraries' files.
_OTHER_DESCRIPTORS = 256

_BAD_REQUEST = Problem(400, "bad-request", "Bad request")
_REQUEST_TIMEOUT = Problem(408, "request-timeout", "Request timeout")
_HEADER_TOO_LARGE = Problem(431, "header-too-large", "Header too large")
_TOO_MANY_CONNECTIONS = Problem(503, "too-many-connections", "Too many connections")


@dataclass(frozen=True)
class ClientLimits:
    """What one client, and all of them together, may take of the front."""

    max_connections: int
    max_header_bytes: int
    request_timeout_s: float


class Clients:
    """The connections of a server: who waits for a request, longest first, and the others."""

    def __init__(self, limits: ClientLimits) -> None:
        self.max_header_bytes = limits.max_header_bytes
        self.request_timeout_s = limits.request_timeout_s
        self.waiting: dict[LimitedProtocol, None] = {}
        self.answering = 0
        self._max_connections = _connections_for(limits.max_connections)
        self._warned_at = -math.inf

    def admit(self, newcomer: LimitedProtocol) -> None:
        """Count a new connection; where there are too many, the first in ``waiting`` goes."""
        while self.waiting and self.answering + len(self.waiting) >= self._max_connections:
            self._warn(newcomer, "those that waited longest are closed")
            longest = next(iter(self.waiting))
            del self.waiting[longest]
            longest.make_room()
        if self.answering >= self._max_connections:
            self._warn(newcomer, "each waits for its answer, so new ones get 503")
            newcomer.turn_away()
        self.waiting[newcomer] = None  # who was turned away, too: the next newcomer ends it

    def _warn(self, newcomer: LimitedProtocol, consequence: str) -> None:
        now = newcomer.loop.time()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            logger.warning(
                "More than %d connections (OGPU_MAX_CONNECTIONS, or what ulimit -n leaves): %s",
                self._max_connections,
                consequence,
            )


class LimitedProtocol(OneWriteProtocol):
    """The protocol for clients that may be slow, endless, or many.

    Each server has a class of its own, with its ``clients``: uvicorn makes the instances.
    """

    clients: Clients
    # The request that arrives now, if any:
    _since: float | None = None  # its first byte; of a new connection, the opening
    _has_begun = False
    _has_headers = False
    _pending_bytes = 0  # of a head, or of trailers: what the parser keeps
    # The connection:
    _unanswered = 0  # requests arrived whole, less answers; -1: answered before it arrived whole
    _refusal: Response | None = None  # and nothing more is heard
    _timer: asyncio.TimerHandle | None = None

    def connection_made(  # type: ignore[override]  # as uvicorn itself declares it
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self._since = self.loop.time()
        self._start_timer(self.clients.request_timeout_s, self._check)
        self.clients.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.clients.waiting.pop(self, None)
        if self._unanswered > 0:
            self.clients.answering -= 1
            self._unanswered = 0  # an application may still answer, to nobody
        super().connection_lost(exc)

    # --- what arrives

    def data_received(self, data: bytes) -> None:
        while data and self._refusal is None:
            # A head that began within a piece is not counted from there, for the parser does not
            # tell where that was: behind another request, one may be twice as long.
            allowed_bytes = self.clients.max_header_bytes - self._pending_bytes
            if not allowed_bytes:
                self._refuse(_header_too_large(self.clients.max_header_bytes))
                break
            piece, data = data[:allowed_bytes], data[allowed_bytes:]
            self._pending_bytes += len(piece)
            OneWriteProtocol.data_received(self, piece)
        if data:
            self.transport.pause_reading()
        elif self._since is None and not self._unanswered:
            self._since = self.loop.time()  # blank lines, which end uvicorn's keep-alive timer

    def on_message_begin(self) -> None:
        OneWriteProtocol.on_message_begin(self)
        self.begin_arriving()

    def on_headers_complete(self) -> None:
        OneWriteProtocol.on_headers_complete(self)
        self._has_headers = True
        self._pending_bytes = 0

    def on_body(self, body: bytes) -> None:
        OneWriteProtocol.on_body(self, body)
        self._pending_bytes = 0

    def on_message_complete(self) -> None:
        OneWriteProtocol.on_message_complete(self)
        self._has_begun = self._has_headers = False
        self._pending_bytes = 0
        self.begin_answering()

    def on_response_complete(self) -> None:
        OneWriteProtocol.on_response_complete(self)
        self.end_answering()

    # --- requests that arrived whole, and their answers

    @property
    def is_resting(self) -> bool:
        """True when nothing of a request has come, no answer is owed, and the last one is taken."""
        return not (
            self._pending_bytes
            or self._has_begun
            or self._unanswered
            or self._refusal is not None
            or self.flow.write_paused
            or self.transport.is_closing()
        )

    def begin_arriving(self) -> None:
        """Take notice that a request has begun to arrive."""
        self._since = self.loop.time()
        self._has_begun = True

    def end_arriving(self) -> None:
        """Take notice that it is there."""
        self._has_begun = False

    def begin_answering(self) -> None:
        """Take notice that a request has arrived."""
        self._unanswered += 1
        # Answered already, the connection has lost uvicorn's keep-alive timer: our clock runs on.
        self._since = None if self._unanswered else self.loop.time()
        if self._unanswered == 1:
            self.clients.waiting.pop(self, None)
            self.clients.answering += 1

    def end_answering(self) -> None:
        """Take notice that an answer is complete."""
        self._unanswered -= 1
        if self._unanswered:
            return
        self.clients.answering -= 1
        self.clients.waiting[self] = None
        if self._refusal is not None:
            self._refuse(self._refusal)
        elif self._since is not None:
            self._since = self.loop.time()  # it had to wait for this answer

    # --- what is refused

    def send_400_response(self, msg: str) -> None:
        self._refuse(_BAD_REQUEST.response(msg))

    def turn_away(self) -> None:
        """Answer a new connection, which may have sent nothing yet, that it is one too many."""
        self._refuse(_too_many_connections())

    def make_room(self) -> None:
        """Close this connection for a newer one."""
        if self._has_begun and self._refusal is None:
            self._answer(_too_many_connections())
        self._close()

    def _check(self) -> None:
        """Cut the request that has been arriving for too long; or look again when that may be."""
        if self.transport.is_closing():
            return
        left_s = timeout_s = self.clients.request_timeout_s
        if self._since is not None and self._unanswered <= 0:
            left_s -= self.loop.time() - self._since
        if left_s > 0:
            self._start_timer(left_s, self._check)
        elif self._has_begun:
            self._refuse(_request_timeout(timeout_s))
        else:
            self._close()

    def _refuse(self, refusal: Response) -> None:
        """Hear no more; answer, when all that came before has its answer; and close."""
        self._refusal = refusal
        if self.transport.is_closing():
            return
        self.transport.pause_reading()
        if self._unanswered > 0:
            return
        self._answer(refusal)
        if self._has_headers:  # an application waits for the body: the end of the connection is its
            self._close()
            return
        # If it were closed now, with bytes unread, the kernel would reset the connection, and the
        # client could lose the answer (RFC 9112, 9.6).
        self.transport.write_eof()
        self._start_timer(_LINGER_S, self.transport.abort)

    def _answer(self, refusal: Response) -> None:
        if self._has_headers and self.cycle.response_started:
            return
        common = header_lines([*self.server_state.default_headers, (b"connection", b"close")])
        self.transport.write(b"".join(encoded(refusal, common)))

    def _close(self) -> None:
        """Close in order, or without it where the client does not take what is left for it."""
        self.transport.close()
        self._start_timer(_LINGER_S, self.transport.abort)

    def _start_timer(self, delay_s: float, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(delay_s, callback)


def _header_too_large(limit_bytes: int) -> Response:
    return _HEADER_TOO_LARGE.response(
        f"At most {limit_bytes} bytes are accepted before the body (OGPU_MAX_HEADER_BYTES)."
    )


def _request_timeout(timeout_s: float) -> Response:
    return _REQUEST_TIMEOUT.response(
        f"The request did not arrive whole within {timeout_s:g} s (OGPU_REQUEST_TIMEOUT)."
    )


def _too_many_connections() -> Response:
    return _TOO_MANY_CONNECTIONS.response(
        "As many clients are connected as OGPU_MAX_CONNECTIONS allows; try again later.",
        retry_after_s=_RETRY_AFTER_S,
    )


def _connections_for(wanted: int) -> int:
    """Return how many connections there may be, of so many, with the descriptors there are.

    Without one uvloop cannot accept a connection to refuse it, and might stop listening for good.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return min(wanted, max(soft - _OTHER_DESCRIPTORS, soft // 2))
