"""The front's event loop: wires journal, outbox, pool and HTTP together, and ends them in order.

Runs in the front, from the moment the template exists.

1. Reserve the port, so that a port in use is an error now and not after a long @init.
2. Listen to the template. With OGPU_BIND=early serve HTTP at once, else when a worker is ready.
3. SIGTERM or SIGINT: accept nothing more and answer 503, let what runs end and callbacks go out,
   for OGPU_DRAIN_TIMEOUT at most; then end the workers, the server, the outbox. A second signal:
   skip the waiting. The pool cannot go on: the same without the waiting, and the error is raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import threading
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

from .config import Settings
from .errors import SettingsError
from .handler import Handler
from .http.app import Application, create_app
from .http.protocol import ClientLimits, limited_protocol
from .http.run import Waiters
from .journal import MemoryJournal
from .logger import batch_lines, logger
from .pool.launcher import Launcher
from .pool.supervisor import Supervisor
from .reporting import EndReporter, report_lost
from .task import TaskState

if TYPE_CHECKING:
    from .outbox import Outbox

_BACKLOG = 2048
_SHUTDOWN_S = 5.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the front has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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

    def on_fatal(self, error: Exception) -> None:
        self.error = self.error or error
        self.asked.set()
        self.hurried.set()


async def serve(settings: Settings, handlers: dict[str, Handler], launcher: Launcher) -> None:
    """Serve until told to stop.

    Raises:
        FirstInitError, PoolBrokenError: the pool did not start, or could not be kept alive.
        SettingsError: the port cannot be had.
    """
    _calm_the_collector()
    batch_lines(asyncio.get_running_loop())
    try:
        await _serve(settings, handlers, launcher)
    finally:
        batch_lines(None)  # what is logged after this has no loop to be written by


async def _serve(settings: Settings, handlers: dict[str, Handler], launcher: Launcher) -> None:
    stop = _Stop()
    _take_signals(stop)
    listener = _reserve_port(settings)
    journal = MemoryJournal()
    logger.warning("Tasks are kept in memory only: a restart of the service loses them")
    outbox = _make_outbox(settings, journal)
    waiters, ends = Waiters(), EndReporter()
    for on_transition in (waiters.on_transition, ends.on_transition):
        journal.on_transition(on_transition)
    supervisor = Supervisor(settings, set(handlers), journal, launcher, stop.on_fatal)
    server = _make_server(
        create_app(settings, handlers, journal, supervisor, waiters), settings
    )
    if outbox is not None:
        journal.on_transition(outbox.on_transition)
        await outbox.start()
    supervisor.begin()
    serving: asyncio.Task[None] | None = None
    try:
        if settings.bind == "ready":
            await _first_of(supervisor.first_ready.wait(), stop.asked.wait())
        if not stop.asked.is_set():
            _listen(listener)
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            await _first_of(stop.asked.wait(), serving)
            if not stop.asked.is_set():
                logger.error("The HTTP server has ended by itself")
        await _first_of(
            _drain(settings.drain_timeout, supervisor, outbox, journal), stop.hurried.wait()
        )
    finally:
        await supervisor.stop(_SHUTDOWN_S)
        ends.flush()
        report_lost(journal)
        waiters.release()
        server.should_exit = True
        if serving is not None:
            await asyncio.wait([serving], timeout=_SHUTDOWN_S)
        listener.close()
        if outbox is not None:
            await outbox.stop()
    if stop.error is not None:
        raise stop.error
    logger.info("Stopped")


def _make_outbox(settings: Settings, journal: MemoryJournal) -> Outbox | None:
    if settings.callback_url is None:
        logger.info("CALLBACK_URL is not set: results are kept here, and sent to nobody")
        return None
    from .outbox import Outbox  # noqa: PLC0415 - its HTTP client takes 0.1 s to import

    return Outbox(settings.callback_url, settings.callback_timeout, journal)


def _make_server(app: Application, settings: Settings) -> _Server:
    limits = ClientLimits(
        settings.max_connections, settings.max_header_bytes, settings.request_timeout
    )
    return _Server(
        uvicorn.Config(
            app,
            http=limited_protocol(limits),
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
    is kept, took 6 % of the front's time under load.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


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


async def _drain(
    timeout_s: float, supervisor: Supervisor, outbox: Outbox | None, journal: MemoryJournal
) -> None:
    """Let tasks end, then callbacks go out, in the time there is."""
    loop = asyncio.get_running_loop()
    limit = loop.time() + timeout_s
    if not await supervisor.drain(timeout_s):
        running = sum(task.state is TaskState.RUNNING for task in journal.active_tasks())
        logger.warning("%d task(s) did not end within %.1f s", running, timeout_s)
    if outbox is not None:
        await outbox.flush(max(0.0, limit - loop.time()))


async def _first_of(*waits: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> None:
    """Wait until one of them is over; end the coroutines among the others."""
    tasks = [
        wait if isinstance(wait, asyncio.Task) else asyncio.create_task(wait) for wait in waits
    ]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        if task not in waits:
            task.cancel()
    await asyncio.gather(*(t for t in pending if t not in waits), return_exceptions=True)
    for task in done:
        task.result()
