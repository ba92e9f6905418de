"""The front's event loop: wires journal, outbox, pool and HTTP together, and ends them in order.

Runs in the front, from the moment the template exists.

1. Reserve the port, so that a port in use is an error now and not after a long @init.
2. Listen to the template; queue what an earlier front has left, and deliver what it owes.
3. With OGPU_BIND=early serve HTTP at once, else when a worker is ready.
4. SIGTERM or SIGINT: accept nothing more and answer 503, let what runs end and callbacks go out,
   for OGPU_DRAIN_TIMEOUT at most; then end the workers, the server, the outbox, and the journal
   last. A second signal: skip the waiting. The pool cannot go on: the same without the waiting, and
   the error is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import signal
import socket
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import uvicorn

from .config import Settings
from .ending import end_all
from .errors import SettingsError
from .events import TaskEvents
from .handler import Handler
from .http.app import Application, create_app
from .http.clients import ClientLimits
from .http.protocol import OneWriteProtocol
from .http.rooms import Rooms
from .http.shortcut import shortcut_protocol
from .http.waiters import Waiters
from .journal import Database, Journal
from .logger import batch_lines, logger
from .metrics import Metrics
from .outbox.outbox import Outbox
from .outbox.receivers import lanes_of
from .pool.places import Places
from .pool.supervisor import Supervisor
from .recovery import recover
from .reporting import EndReporter, report_left
from .task import TaskState

_BACKLOG = 2048
_SHUTDOWN_S = 5.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
BROKEN_SHOWN_S = 3.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the front has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def drop_deaf_clients(self) -> None:
        """Cut those off who do not read: nothing more reaches them, and uvicorn would wait."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, OneWriteProtocol) and connection.is_deaf:
                connection.transport.abort()


class _Stop:
    """Why the front is to stop: a first signal, a second one, or an error of the pool."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self.error: Exception | None = None

    def on_signal(self, number: int) -> None:
        if self.asked.is_set():
            logger.warning("%s again: stopping at once", signal.Signals(number).name)
            self.hurried.set()
        else:
            logger.info("%s: draining", signal.Signals(number).name)
            self.asked.set()

    def on_fatal(self, error: Exception, *, at_once: bool) -> None:
        self.error = self.error or error
        self.asked.set()
        if at_once:
            self.hurried.set()


async def serve(
    settings: Settings,
    handlers: dict[str, Handler],
    places: Places,
    database: Database,
) -> None:
    """Serve until told to stop.

    Raises:
        FirstInitError, PoolBrokenError: the pool did not start, or could not be kept alive.
        JournalError: the journal cannot be read.
        SettingsError: the port cannot be had.
    """
    _calm_the_collector()
    _keep_memory()
    batch_lines(asyncio.get_running_loop())
    try:
        await _Front(settings, handlers, places, database).serve()
    finally:
        batch_lines(None)  # what is logged after this has no loop to be written by


class _Front:
    """The parts of the front, and the order in which they begin and end."""

    def __init__(
        self,
        settings: Settings,
        handlers: dict[str, Handler],
        places: Places,
        database: Database,
    ) -> None:
        self._settings = settings
        self._handlers = handlers
        self._stop = _Stop()
        self._metrics, self._events, self._ends = Metrics(), TaskEvents(), EndReporter()
        self._journal = Journal(database, lanes_of(settings), self._metrics, settings.task_ttl)
        self._supervisor = Supervisor(
            settings,
            handlers,
            self._journal,
            places,
            (self._events, self._metrics),
            self._stop.on_fatal,
        )
        self._outbox = self._make_outbox()
        self._waiters = Waiters()
        self._metrics.observe(self._supervisor, lambda: self._journal.undelivered)
        self._journal.on_end(self._waiters.wake)
        self._journal.on_end(self._ends.on_end)
        self._journal.on_transition(self._events.on_transition)
        self._journal.on_transition(self._metrics.on_transition)
        self._journal.on_withdrawn(self._waiters.wake)
        if self._outbox is not None:
            self._journal.on_stored(self._outbox.on_stored)

    async def serve(self) -> None:
        _take_signals(self._stop)
        listener = _reserve_port(self._settings)
        lag = asyncio.create_task(self._metrics.watch_loop())
        serving: asyncio.Task[None] | None = None
        server = _make_server(self._make_app(), self._settings)
        try:
            self._supervisor.begin()
            await recover(self._journal, self._supervisor, self._handlers, self._settings)
            if self._outbox is not None:
                self._outbox.start()
            if self._settings.bind == "ready":
                await _first_of(self._supervisor.first_ready.wait(), self._stop.asked.wait())
            if not self._stop.asked.is_set():
                _listen(listener)
                serving = asyncio.create_task(server.serve(sockets=[listener]))
                await _first_of(self._stop.asked.wait(), serving)
                if not self._stop.asked.is_set():
                    logger.error("The HTTP server has ended by itself")
            await _first_of(self._drain(), self._stop.hurried.wait())
        finally:
            await self._end(server, serving, listener, lag)
        if self._stop.error is not None:
            raise self._stop.error
        logger.info("Stopped")

    async def _drain(self) -> None:
        """Let tasks end, then callbacks go out, in the time there is."""
        loop = asyncio.get_running_loop()
        if self._stop.error is not None:
            # Those who watch readiness are to see why; the tasks of other workers end meanwhile.
            logger.critical("The service is broken, and about to end: %s", self._stop.error)
            await asyncio.sleep(BROKEN_SHOWN_S)
        timeout_s = self._settings.drain_timeout
        limit = loop.time() + timeout_s
        if not await self._supervisor.drain(timeout_s):
            running = sum(t.state is TaskState.RUNNING for t in self._journal.unfinished())
            logger.warning("%d task(s) did not end within %.1f s", running, timeout_s)
        if self._outbox is not None:
            # What has just ended is to be offered to the outbox; a disk may hang, though.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._journal.settle(), max(0.0, limit - loop.time()))
            await self._outbox.flush(max(0.0, limit - loop.time()))

    async def _end(
        self,
        server: _Server,
        serving: asyncio.Task[None] | None,
        listener: socket.socket,
        lag: asyncio.Task[None],
    ) -> None:
        await self._supervisor.stop(_SHUTDOWN_S)
        self._ends.flush()
        self._waiters.release()
        self._events.close()
        server.drop_deaf_clients()
        server.should_exit = True
        if serving is not None:
            await asyncio.wait([serving], timeout=_SHUTDOWN_S)
        listener.close()
        if self._outbox is not None:
            await self._outbox.stop()
        await end_all([lag])
        report_left(self._journal)
        await self._journal.close()

    def _make_outbox(self) -> Outbox | None:
        if self._settings.callback_url is None:
            logger.info("CALLBACK_URL is not set: results are kept here, and sent to nobody")
        if not lanes_of(self._settings):
            return None
        return Outbox(self._settings, self._journal, self._metrics)

    def _make_app(self) -> Application:
        return create_app(
            self._settings,
            self._handlers,
            Rooms(
                self._journal,
                self._supervisor,
                self._outbox,
                self._events,
                self._metrics,
                self._waiters,
            ),
        )


def _make_server(app: Application, settings: Settings) -> _Server:
    limits = ClientLimits(
        settings.max_connections, settings.max_header_bytes, settings.request_timeout
    )
    return _Server(
        uvicorn.Config(
            app,
            http=shortcut_protocol(limits, app),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=1,
        )
    )


def _calm_the_collector() -> None:
    """Spare what exists now from collection, and collect what comes later less often.

    Tasks hold no cycles. With the default thresholds the collector, which visits every task that
    is kept, took 6 % of the front's time under load. (Nothing is collected here: see
    ``fork_template``.)
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _keep_memory() -> None:
    """Have malloc keep what large bodies took, up to 64 MiB, for the next ones (mallopt(3)).

    By default it maps memory for each of them, which the kernel has to clear page by page: at 1 MiB
    in and out that was a fifth of the front's time.
    """
    with contextlib.suppress(AttributeError):  # a C library without it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def _take_signals(stop: _Stop) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.on_signal, number)


def _reserve_port(settings: Settings) -> socket.socket:
    """Bind without listening: clients are refused until the server listens."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise _port_error(settings.host, settings.port, error) from error
    return listener


def _listen(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(_BACKLOG)
    except OSError as error:  # another one reserved the port as we did, and was ready sooner
        raise _port_error(host, port, error) from error
    logger.info("Connected to OpenGPU Service 🔵")
    logger.info("Listening on http://%s:%d (API docs: /docs)", host, port)


def _port_error(host: str, port: int, error: OSError) -> SettingsError:
    return SettingsError(
        f"cannot listen on {host}:{port}: {error.strerror}; "
        "set OGPU_HOST and OGPU_PORT (0 = any free port)"
    )


async def _first_of(*waits: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Wait until one of them is over; end the coroutines among the others."""
    tasks = [
        wait if isinstance(wait, asyncio.Task) else asyncio.create_task(wait) for wait in waits
    ]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await end_all(task for task in pending if task not in waits)
    for task in done:
        task.result()
