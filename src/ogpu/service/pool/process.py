"""One worker process as the front sees it: its channel, its output, and the way to kill it.

Runs in the front. It reports to a ``WorkerEvents``; it decides nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Protocol, cast

from .. import wire
from ..errors import WireError
from ..logger import logger
from ..processes import would_handle
from ..task import Task, WorkerReference
from .ahead_socket import AheadSocket
from .memory import NOT_ASKED
from .output import WorkerOutput

# faulthandler took 0.2 ms for a handler in Python; a hundred deep threads may take some more.
DUMP_LIMIT_S = 0.1
CHANNEL_LIMIT_S = 5.0
# Beside its answers a worker says how far it is: two words a task at once, ten a second. A word
# takes the front about 6 µs, so one that never stops would have it for itself.
_MOST_WORDS, _MOST_WORDS_PER_S = 100, 20
_READ_BYTES, _MOST_READS, _NO_WAIT = 64 * 1024, 16, socket.MSG_DONTWAIT


class WorkerEvents(Protocol):
    """Who wants to know what a worker says."""

    def on_message(self, process: WorkerProcess, message: wire.Message, payload: bytes) -> None:
        """Take a message from the worker."""

    def on_line(self, task: Task, line: str) -> None:
        """Take a line that the worker printed while it ran the task."""

    def on_channel_error(self, process: WorkerProcess, error: WireError) -> None:
        """Take notice that the worker does not speak the protocol any more."""

    def on_channel_closed(self, process: WorkerProcess) -> None:
        """Take notice that the worker's end of the channel is closed."""

    def on_ended(self, process: WorkerProcess) -> None:
        """Take notice that the process has ended; Gone follows when nothing of it is left."""

    def guard(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a callback, and take notice of a defect in it."""


class WorkerProcess(asyncio.Protocol):
    """A live worker: descriptors that came with Launched, and the frames on them."""

    def __init__(
        self,
        launched: wire.Launched,
        device: str | None,
        descriptors: list[int],
        max_payload_bytes: int,
        events: WorkerEvents,
    ) -> None:
        channel_fd, output_fd, self._stacks_fd, self._pidfd = descriptors
        self._channel = socket.socket(fileno=channel_fd)
        self.pid = launched.pid
        self.slot = launched.slot
        self.reference = WorkerReference(launched.slot, launched.generation, launched.pid, device)
        self.output = WorkerOutput(output_fd, launched.slot, events.on_line, self.hear)
        self.ahead = AheadSocket()
        # True when the worker's end was closed with orders in it that nobody had read.
        self.orders_unread = False
        # Set, but while deaths.py asks it for its stacks: its task ends with the answer.
        self.settled = asyncio.Event()
        self.settled.set()
        self._stacks: str | None = None
        self.memory = NOT_ASKED  # once it is buried: whether it ran out of memory
        self.is_gone = False  # it has been reaped, and is being buried
        self._decoder = wire.FrameDecoder(max_payload_bytes)
        self._words, self._order_s = 0, time.monotonic()  # said since the last orders
        self._orders = 1  # how many those were
        self._is_broken = False
        self._events = events
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._closed = self._loop.create_future()
        self._ended = self._loop.create_future()
        # pidfd_open(2): it is readable when the process has ended, reaped or not.
        self._loop.add_reader(self._pidfd, self._on_end)

    async def connect(self) -> None:
        """Begin to read the channel."""
        self._channel.setblocking(False)
        await self._loop.create_unix_connection(lambda: self, sock=self._channel)

    def share_ahead(self) -> None:
        """Let the worker take orders ahead; call it once, before it has any order."""
        try:
            self.ahead.share(self._channel)
        except OSError:  # there is no room for a descriptor on its way, or it has died since
            with contextlib.suppress(OSError):
                self._channel.send(b"\0")  # it takes orders one by one

    def send(self, orders: list[tuple[wire.Run, bytes]]) -> None:
        """Send orders; what does not fit into the socket at once is sent as the worker reads."""
        self.note_orders(len(orders))
        if self._transport is not None and not self._transport.is_closing():
            parts = [part for order in orders for part in wire.encode_parts(*order)]
            self._transport.writelines(parts)
        else:
            self.orders_unread = True

    def note_orders(self, count: int) -> None:
        """Take notice that the worker has so many orders now, of which it may say something."""
        self._words, self._order_s, self._orders = 0, time.monotonic(), count

    def hear(self) -> None:
        """Read what the worker has said until now, ahead of the event loop."""
        # Not before it is connected: who is ready is sent an order at once.
        if self._transport is not None and not self._closed.done():
            self._events.guard(self._read)

    def _read(self) -> None:
        try:
            for _ in range(_MOST_READS):
                if self._is_broken or not (said := self._channel.recv(_READ_BYTES, _NO_WAIT)):
                    return
                self._take(said)
        except BlockingIOError:
            return
        except ConnectionResetError:  # the kernel says so once (``connection_lost``)
            self.orders_unread = True
        except OSError:  # it is closed here, and nothing more is wanted of it
            return

    def ask(self) -> None:
        """Have TaskTimeout raised in the handler."""
        self._signal(wire.ASK_SIGNAL)

    def kill(self) -> None:
        """Kill the worker."""
        self._signal(signal.SIGKILL)

    async def kill_with_stacks(self) -> str | None:
        """Kill the worker, and return what its threads were doing, where it could say so.

        It has DUMP_LIMIT_S for that, and none where it would not listen.
        """
        if self._pidfd >= 0 and would_handle(self.pid, wire.DUMP_SIGNAL):
            self._forget_stacks()
            self._signal(wire.DUMP_SIGNAL)
            await asyncio.wait([self._ended], timeout=DUMP_LIMIT_S)
        self.kill()
        return self.stacks()

    def stacks(self) -> str | None:
        """Return the stacks that the worker has written down: when asked, or at a crash."""
        if self._stacks_fd >= 0:
            text, _, _ = os.pread(self._stacks_fd, wire.STACKS_BYTES, 0).partition(b"\0")
            readable = text.decode("utf-8", "backslashreplace").strip()
            self._stacks = readable[: wire.MAX_TEXT_CHARS] or None
        return self._stacks

    @property
    def has_ended(self) -> bool:
        """True when the process is dead, though something that it started may be there."""
        return self._ended.done()

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._ended.set_result(None)
        self._events.guard(self._events.on_ended, self)

    def _forget_stacks(self) -> None:
        """Empty the file: a child of an earlier task may have crashed, with our descriptor."""
        try:
            os.lseek(self._stacks_fd, 0, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nobody has written to it (lseek(2)), as a rule
                return
        os.pwrite(self._stacks_fd, bytes(wire.STACKS_BYTES), 0)
        os.lseek(self._stacks_fd, 0, os.SEEK_SET)  # one position, for the worker as well

    def _signal(self, number: int) -> None:
        """Send a signal. A pidfd cannot mean any other process; a dead one stays dead."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:  # it is dead already, and Gone is on its way
                return
            except PermissionError as error:  # it runs as another user by now
                logger.error("Worker %d (pid %d) takes no signal: %s", self.slot, self.pid, error)

    def dismiss(self) -> None:
        """Let an idle worker leave by itself: it reads the end of its channel."""
        if self._transport is not None:
            self._transport.close()

    async def heard_out(self, limit_s: float) -> None:
        """Wait until all that the worker has said is read: its last words may be an answer."""
        await asyncio.wait([self._closed], timeout=limit_s)

    async def bury(self) -> None:
        """Take the last words of a worker that is gone, and give its descriptors back."""
        # Nothing is left that could hold the other end, so the end of the channel is near.
        await self.heard_out(CHANNEL_LIMIT_S)
        if self._transport is not None:
            self._transport.abort()
        self._decoder = wire.FrameDecoder(0)  # what was begun may be as long as a result
        self.output.close()
        self.stacks()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
        self.ahead.close()
        for descriptor in (self._pidfd, self._stacks_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._pidfd = self._stacks_fd = -1

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by isinstance

    def data_received(self, data: bytes) -> None:
        if not self._is_broken:
            self._events.guard(self._take, data)

    def _take(self, data: bytes) -> None:
        try:
            for message, payload in self._decoder.feed(data):
                self._count_word()
                self._events.on_message(self, message, payload)
        except WireError as error:
            # It is not closed here: its end tells whether the last order was read.
            self._is_broken = True
            self._events.on_channel_error(self, error)

    def _count_word(self) -> None:
        self._words += 1
        if self._words > _MOST_WORDS:
            since_s = time.monotonic() - self._order_s
            if self._words > self._orders * (_MOST_WORDS + _MOST_WORDS_PER_S * since_s):
                raise WireError(f"it said {self._words} things within {since_s:.1f} s")

    def connection_lost(self, error: Exception | None) -> None:
        # unix(7): closing a stream socket with unread data in it resets the peer.
        if isinstance(error, (ConnectionResetError, BrokenPipeError)):
            self.orders_unread = True
        if not self._closed.done():
            self._closed.set_result(None)
        self._events.guard(self._events.on_channel_closed, self)
