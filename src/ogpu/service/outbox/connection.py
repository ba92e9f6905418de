"""One connection to a receiver: a POST, its answer, and the next one. Runs in the front.

1. ``exchange`` sends a request whole where it is small, else in pieces, as fast as it is taken.
2. The answer counts with its head. Its body is read, so that the connection is free for the next
   request, and dropped. Where it is long or never ends, the connection is dropped instead.
3. Then the connection waits among those that are idle, for ``_IDLE_S`` at most.
4. The time is over, the receiver hangs up, or what it says is not HTTP: the exchange ends with an
   error, unless there was the head of an answer; the connection is closed in any case.

One timer watches a connection all its life: one for each request would cost as much as the request
takes to be written. So it may ring too early, and is set again.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple, cast

import httptools

_IDLE_S = 15.0  # less than what lies in between (NAT, load balancers) forgets a connection after
_ANSWER_BYTES = 64 * 1024  # head and body; what is longer ends the connection
_PIECE_BYTES = 64 * 1024
_RETRY_AFTER = b"retry-after"


class Answer(NamedTuple):
    """What a receiver has answered: the status, and ``Retry-After`` as it stands there."""

    status: int
    retry_after: str | None


class ClosedUnansweredError(ConnectionError):
    """Raised when the receiver hangs up before the first byte of an answer."""


class Connection(asyncio.Protocol):
    """A connection that is kept for one request after the other.

    Args:
        idle: where it is while it is free, the one used last at the end.
    """

    def __init__(self, idle: list[Connection]) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle = idle
        self._parser = httptools.HttpResponseParser(self)
        # What is under way. An error is its result: an exception that nobody fetches, since the
        # carrier was cancelled, would be logged.
        self._exchange: asyncio.Future[Answer | OSError] | None = None
        self._is_sent = False
        self._can_write = asyncio.Event()
        self._can_write.set()
        # The answer:
        self._received_bytes = 0
        self._status: int | None = None  # of 1xx, which precede the answer, there is none
        self._retry_after: str | None = None
        self._is_whole = False
        self._keeps_alive = False
        # When the exchange is to be over, or the idleness; and when the timer rings.
        self._until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0

    async def exchange(self, head: bytes, body: bytes, until: float) -> Answer:
        """Send a request and return the answer.

        Args:
            head: all of it, the empty line included.
            body: as long as the head says.
            until: when it has to be over, on the clock of the event loop.

        Raises:
            ClosedUnansweredError: the receiver hung up before it said anything.
            ConnectionError: it hung up within the head of its answer, or that is not HTTP.
            TimeoutError: there is no answer in time.
        """
        if self._transport.is_closing():
            raise ClosedUnansweredError("the receiver hung up before it was sent anything")
        self._received_bytes = 0
        self._status = self._retry_after = None
        self._is_whole = self._keeps_alive = False
        self._exchange = exchange = self._loop.create_future()
        self._watch(until)
        try:
            if len(body) <= _PIECE_BYTES:
                self._is_sent = True
                self._transport.write(head + body)
            else:
                self._is_sent = False
                await self._send_in_pieces(exchange, head, body)
            answer: Answer | OSError = await exchange
        except asyncio.CancelledError:
            self._exchange = None
            self.abort()
            raise
        if isinstance(answer, OSError):
            try:
                raise answer
            finally:
                del answer, exchange  # they refer to this frame, which would keep the body
        return answer

    def abort(self) -> None:
        """Close the connection at once."""
        self._transport.abort()

    async def _send_in_pieces(
        self, exchange: asyncio.Future[Answer | OSError], head: bytes, body: bytes
    ) -> None:
        """Send until there is an answer, which may come early (413), or an error."""
        self._transport.write(head)
        pieces = memoryview(body)
        for start in range(0, len(body), _PIECE_BYTES):
            await self._can_write.wait()
            if exchange.done():
                return
            self._transport.write(pieces[start : start + _PIECE_BYTES])
        self._is_sent = True

    def _end(self, error: OSError | None = None) -> None:
        """End the exchange: with an answer, if there was its head, or else with the error."""
        exchange, self._exchange = self._exchange, None
        if error is None and self._is_reusable:
            self._watch(self._loop.time() + _IDLE_S)
            self._idle.append(self)
        else:
            self.abort()
        if exchange is None or exchange.done():
            return
        if self._status is not None:
            exchange.set_result(Answer(self._status, self._retry_after))
        else:
            assert error is not None
            exchange.set_result(error)
        self._can_write.set()  # who sends is to see it

    @property
    def _is_reusable(self) -> bool:
        """True when all was sent, and what came is one answer, whole, and no "close"."""
        is_sent = self._is_sent and not self._transport.get_write_buffer_size()
        return self._is_whole and self._keeps_alive and is_sent

    # --- the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._watch(self._loop.time() + _IDLE_S)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self in self._idle:
            self._idle.remove(self)
        if self._exchange is not None:
            reason = f": {exc}" if exc else ""
            if self._received_bytes:
                error = ConnectionError(f"the receiver hung up within its answer{reason}")
            else:
                error = ClosedUnansweredError(f"the receiver hung up without an answer{reason}")
            self._end(error)
        del self._parser  # it refers to this object, and would keep it until a collection

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            self.abort()  # nobody has asked
            return
        self._received_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._end(ConnectionError(f"what the receiver answered is not HTTP: {error}"))
            return
        if self._is_whole:
            self._end()
        elif self._received_bytes > _ANSWER_BYTES:
            self._end(ConnectionError(f"the head of the answer exceeds {_ANSWER_BYTES} bytes"))

    # --- the parser calls

    def on_message_begin(self) -> None:
        if self._is_whole:  # a second answer: nobody has asked
            self._keeps_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == _RETRY_AFTER and not self._is_whole:
            self._retry_after = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200 and status != 101:  # 101 ends HTTP, which nobody has asked for
            self._retry_after = None
        elif not self._is_whole:
            self._status = status

    def on_message_complete(self) -> None:
        if self._status is not None and not self._is_whole:
            self._is_whole = True
            self._keeps_alive = self._parser.should_keep_alive()

    # --- the time

    def _watch(self, until: float) -> None:
        self._until = until
        if self._timer is not None:
            if self._rings_at <= until:
                return
            self._timer.cancel()
        self._rings_at = until
        self._timer = self._loop.call_at(until, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._loop.time() < self._until:
            self._watch(self._until)
        elif self._exchange is None:
            self.abort()
        else:
            self._end(TimeoutError("the receiver has not answered in time"))
