"""``start()``: what the source calls last. It knows its role, makes the template, and serves.

Runs in the front, until the event loop starts in ``front.serve``:

1. In a worker, or while the source is imported again: return at once.
2. Read the settings. An invalid one ends the program (exit code 2) before anything has begun.
3. Make the template, while this process still has one thread: fork it, or where a fork is not
   safe, start it as a fresh interpreter. It begins with @prepare. Open the journal; look for GPUs
   meanwhile, and say which slot sees which. Order the first worker, which begins with @init.
4. Only now import the web server, beside those two. Serve until SIGTERM, SIGINT or the end of
   the pool. Exit code 3: the first worker failed; 4: the pool could not be kept alive.

However this process ends, its end of the template's control socket is closed with it, and the
template then ends every worker and whatever they started. Should both end at once, the kernel ends
the workers; what those had started is the one thing that may be left then.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from .config import CALLBACK_URL, SERVICE_HOST, SERVICE_PORT, Settings, describe, load_settings
from .errors import ServiceError
from .handler import Handler, get_handlers, get_init_handler, get_prepare_handler, registered
from .logger import configure_front, enable_sentry, logger
from .processes import (
    become_subreaper,
    open_standard_descriptors,
    own_children,
    raise_descriptor_limit,
    require_platform,
)
from .role import may_serve

if TYPE_CHECKING:
    from .journal import Database
    from .pool.launcher import Template

__all__ = [
    "CALLBACK_URL",
    "SERVICE_HOST",
    "SERVICE_PORT",
    "get_handlers",
    "get_init_handler",
    "lifespan",
    "logger",
    "send_callback",
    "start",
]

_SHOWN_BYTES = 1000
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_FIRST_GENERATION = 1
_LEAVE_LIMIT_S = 5.0
_LOOK_AGAIN_S = 0.005


def start(**overrides: object) -> None:
    """Serve the registered handlers; block until the end of a drain.

    Args:
        overrides: settings by name, such as ``port=8080``; they win over the environment.

    Raises:
        SystemExit: 2 for an invalid setting or platform, 3 when the first worker fails, 4 when
            the pool cannot be kept alive. The log says why.

    Example:
        >>> ogpu.service.start()
    """
    if not may_serve():
        return
    logger.disabled = False  # see configure_front(): what is wrong with the settings is logged
    try:
        settings = load_settings(**{**_assigned(), **overrides})
        configure_front(settings.wanted_log_level, settings.log_format)
        require_platform()
        open_standard_descriptors()
        raise_descriptor_limit()
        _serve(settings)
    except ServiceError as error:
        logger.critical("%s", error)
        raise SystemExit(error.exit_code) from error


def send_callback(task_address: str, result: dict[str, Any]) -> None:
    """Post a result to ``{CALLBACK_URL}/{task_address}``, once, and wait for the answer.

    Kept for sources that call it themselves; the service delivers results through its outbox.

    Raises:
        ValueError: the result has a NaN or an infinity, which JSON does not have.
        OSError: there was no answer.
    """
    if not CALLBACK_URL:
        logger.info("No callback address configured, skipping callback for task: %s", task_address)
        return
    request = urllib.request.Request(  # noqa: S310 - the operator's own URL
        f"{CALLBACK_URL}/{task_address}",
        data=json.dumps(result, allow_nan=False).encode(),
        headers={"content-type": "application/json"},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=30):  # noqa: S310 - as above
            logger.info("Callback sent to %s", request.full_url)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(_SHOWN_BYTES).decode(errors="replace")
        logger.error("Failed to send callback: %s %s", error.code, said)


@asynccontextmanager
async def lifespan(_: object) -> AsyncIterator[None]:
    """Run the init function, as the lifespan of a web application.

    Kept for sources that build their own application from ``get_handlers()``; ``start()`` has no
    use for it.
    """
    function = get_init_handler()
    if function is not None:
        logger.info("Executing init function: `%s`", function.__name__)
        try:
            function()
        except Exception as error:
            logger.error("Init function `%s` failed: %s", function.__name__, error)
            raise
        logger.info("Init function `%s` completed successfully", function.__name__)
    logger.info("Connected to OpenGPU Service 🔵")
    logger.info("API docs: http://%s:%d/docs", SERVICE_HOST, SERVICE_PORT)
    yield


_AT_IMPORT = {"callback_url": CALLBACK_URL, "host": SERVICE_HOST, "port": SERVICE_PORT}
_send_callback = send_callback


def _assigned() -> dict[str, object]:
    """Return what the source has assigned to constants of this module, as settings.

    The frozen start() read them here (and not in ``config``), so assigning to them is how sources
    set the port; it won over the environment there, and does here.
    """
    now = {"callback_url": CALLBACK_URL or None, "host": SERVICE_HOST, "port": SERVICE_PORT}
    return {name: value for name, value in now.items() if value != (_AT_IMPORT[name] or None)}


def _serve(settings: Settings) -> None:
    handlers = registered()
    with ExitStack() as stack:
        with _holding_signals():
            _announce(settings, handlers)
            sources = own_children()
            become_subreaper()  # should the template die, its workers' orphans come here
            template, make_another = _make_template(settings)
            stack.callback(_end_unheard, template[0], sources)
            stack.enter_context(template[1])
            # Set before the fork, these handlers would be the workers' as well.
            leaving = stack.enter_context(_leaving_on_signals())
        # From here on the process may have threads. The journal comes before the first worker: a
        # second front on its folder is to end before it loads a model, too.
        from .devices.devices import begin_look, find_devices  # noqa: PLC0415 - asyncio

        look = begin_look(settings)
        database = _open_journal(settings, stack)
        from .pool.launcher import Launcher  # noqa: PLC0415 - as above
        from .pool.places import Places  # noqa: PLC0415 - as above
        from .pool.scratch import ScratchFolders  # noqa: PLC0415 - as above

        devices = find_devices(settings, look)
        stack.callback(devices.close)
        scratch = ScratchFolders()
        stack.callback(scratch.close)
        launcher = Launcher(template, make_another, settings, sources)
        folder, variables = scratch.make(0, _FIRST_GENERATION), devices.plans[0].environment
        launcher.launch(0, _FIRST_GENERATION, folder, variables)
        enable_sentry()

        import uvloop  # noqa: PLC0415 - the front's libraries are not for template and workers

        from .front import serve  # noqa: PLC0415 - the same

        leaving.check()
        try:
            uvloop.run(serve(settings, handlers, Places(launcher, scratch, devices), database))
        except RuntimeError as error:
            # Where no thread can be started any more, the loop cannot be ended as it is wont to.
            if isinstance(error.__context__, ServiceError):
                raise error.__context__ from None
            raise


def _end_unheard(template: int, sources: set[int]) -> None:
    """End a template that runs @prepare, with what that has started: it does not hear us leave.

    Where the event loop ran, that is done already.
    """
    if get_prepare_handler() is None or template not in own_children():
        return
    from .pool.pidfd import kill_children  # noqa: PLC0415 - asyncio

    limit = time.monotonic() + _LEAVE_LIMIT_S
    while kill_children(but=sources) and time.monotonic() < limit:
        time.sleep(_LOOK_AGAIN_S)


def _open_journal(settings: Settings, stack: ExitStack) -> Database:
    from .journal import Database, StateFolder  # noqa: PLC0415 - asyncio, sqlite3

    if settings.state_dir == ":memory:":
        logger.warning(
            "Tasks are kept in memory only (OGPU_STATE_DIR=:memory:): a restart of the service "
            "loses them"
        )
        return Database(None)
    folder = StateFolder(settings.state_dir)
    stack.callback(folder.close)
    logger.info("Tasks are kept in %s", folder.path)
    return Database(folder)


def _announce(settings: Settings, handlers: dict[str, Handler]) -> None:
    logger.info("Starting OpenGPU Service server...")
    logger.info("%s", describe(settings))
    for name, handler in handlers.items():
        timeout_s = handler.timeout_s or settings.task_timeout
        limit = "no timeout" if timeout_s is None else f"timeout {timeout_s:g} s"
        logger.info("Registered endpoint → /run/%s/{task_address} (%s)", name, limit)
    if send_callback is not _send_callback:
        logger.warning(
            "The source has replaced ogpu.service.server.send_callback, which is not called here: "
            "results go to CALLBACK_URL by themselves. What it did belongs into the handlers."
        )


def _make_template(settings: Settings) -> tuple[Template, Callable[[], Template]]:
    """Make the template, and return it with the way to make another one, should it be lost."""
    from .worker.hazards import fork_hazard  # noqa: PLC0415 - only the front asks
    from .worker.spawned import Source  # noqa: PLC0415 - the same
    from .worker.template import exec_template, fork_template  # noqa: PLC0415 - the same

    source = Source.of_this_process(settings.wanted_log_level, settings.log_format)
    method = start_method = settings.start_method
    if start_method == "auto":
        hazard = fork_hazard()
        method = "fork" if hazard is None else "spawn"
        if hazard is not None:
            logger.warning("Workers are spawned, since a fork is not safe: %s", hazard)
    later_method = start_method if method == "fork" else "spawn"
    make_another = functools.partial(exec_template, source, later_method)
    if method == "fork":
        return fork_template(source, start_method), make_another
    return make_another(), make_another


@contextmanager
def _holding_signals() -> Iterator[None]:
    """Let a stop signal wait until there is a handler for it; the template lets them go again."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


class _Leaving:
    """Leaves at once on a stop signal. ``check`` is for where that did not come through.

    The handler's SystemExit is raised wherever the main thread is: while it imports, that may be
    within a callback which makes another exception of it (pydantic-core: "SchemaError: …
    SystemExit: 0") or drops it (a destructor).
    """

    def __init__(self) -> None:
        self.was_asked = False

    def on_signal(self, number: int, _: FrameType | None) -> NoReturn:
        logger.info("%s while starting: leaving", signal.Signals(number).name)
        self.was_asked = True
        sys.exit(0)

    def check(self) -> None:
        """Leave, if that was asked for."""
        if self.was_asked:
            sys.exit(0)


@contextmanager
def _leaving_on_signals() -> Iterator[_Leaving]:
    """Leave at once on a stop signal until the event loop takes the signals over.

    As PID 1 of a container this process would not even notice a SIGTERM without a handler.
    """
    leaving = _Leaving()
    if threading.current_thread() is not threading.main_thread():
        yield leaving  # only the main thread may set handlers; whoever started us stops us, too
        return
    before = {number: signal.signal(number, leaving.on_signal) for number in _STOP_SIGNALS}
    try:
        yield leaving
    except Exception:  # an import may have made another one of SystemExit (pydantic's SchemaError)
        leaving.check()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
