"""The service's logger: ``ogpu.service.logger``, its three extra levels, its formats, and Sentry.

Runs in every process. In the front it writes to stderr: plain, coloured on a terminal, or JSON. In
a worker each record becomes one marked line of output (``wire.encode_log``), which the front reads
with everything else that the worker prints, and logs again with the slot and the task beside it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from types import ModuleType
from typing import TYPE_CHECKING, Any, TextIO, cast

from . import config, wire

SUCCESS_LEVEL = 25
TIMEOUT_LEVEL = 35
FAIL_LEVEL = 45

_SOURCE_FILE = logging._srcfile  # noqa: SLF001 - see batch_lines
_BATCH_S = 0.02
# A longer record loses its middle; as one line of JSON the rest is within output.MAX_LINE_BYTES.
_RECORD_HEAD_CHARS, _RECORD_TAIL_CHARS = 4 * 1024, 12 * 1024
_RESET = "\x1b[0m"
# level name: (label, ANSI colour); labels and colours are those of the frozen module
_THEMES = {
    "DEBUG": ("DEBUG", "\x1b[34m"),
    "INFO": ("INFO", "\x1b[32m"),
    "SUCCESS": ("✅ SUCCESS", "\x1b[36m"),
    "WARNING": ("WARNING", "\x1b[33m"),
    "TIMEOUT": ("⏱️  TIMEOUT", "\x1b[95m"),
    "ERROR": ("ERROR", "\x1b[31m"),
    "FAIL": ("❌ FAIL", "\x1b[31m"),
    "CRITICAL": ("CRITICAL", "\x1b[35m"),
}


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler  # has no [] before Python 3.11


class ServiceLogger(logging.Logger):
    """The type of ``logger``: ``logging.Logger`` with the three outcomes of a task.

    Options are those of every other method of a logger: ``exc_info``, ``extra``, ``stacklevel``.
    """

    def task_success(self, message: object, *args: object, **options: Any) -> None:  # noqa: ANN401 - as in logging
        """Log at SUCCESS (25): a task succeeded."""
        if self.isEnabledFor(SUCCESS_LEVEL):
            self._log(SUCCESS_LEVEL, message, args, **options)

    def task_timeout(self, message: object, *args: object, **options: Any) -> None:  # noqa: ANN401 - as in logging
        """Log at TIMEOUT (35), and to Sentry as a warning: a task passed its deadline."""
        if self.isEnabledFor(TIMEOUT_LEVEL):
            self._log(TIMEOUT_LEVEL, message, args, **options)
            _capture(message, args, "warning")

    def task_fail(self, message: object, *args: object, **options: Any) -> None:  # noqa: ANN401 - as in logging
        """Log at FAIL (45), and to Sentry as an error: a task failed."""
        if self.isEnabledFor(FAIL_LEVEL):
            self._log(FAIL_LEVEL, message, args, **options)
            _capture(message, args, "error")


class PlainFormatter(logging.Formatter):
    """One line a record, as the frozen module writes it; coloured where that can be seen."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour
        self._second = -1
        self._time_text = ""

    def format(self, record: logging.LogRecord) -> str:
        label, colour = _THEMES.get(record.levelname, (record.levelname, ""))
        text = f"[{self._time(record.created)}] {label:<11} {_place(record)}{record.getMessage()}"
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        if not self._colour:
            return text
        return text.replace(label, f"{colour}{label}{_RESET}", 1)

    def _time(self, created: float) -> str:
        second = int(created)
        if second != self._second:  # strftime once a second: it costs as much as all the rest
            self._second = second
            self._time_text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        return self._time_text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and slot and task where known."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key in ("slot", "task_address"):
            value = getattr(record, key, None)
            if value is not None:
                entry[key] = value
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class _WorkerFormatter(logging.Formatter):
    """A marked line for the front, which formats the record for good."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        if len(text) > _RECORD_HEAD_CHARS + _RECORD_TAIL_CHARS:
            text = f"{text[:_RECORD_HEAD_CHARS]}\n…\n{text[-_RECORD_TAIL_CHARS:]}"
        return wire.encode_log(record.levelno, text)


class _BatchingHandler(_StreamHandler):
    """Writes lines at once, or, on an event loop, those of _BATCH_S together.

    Warnings and worse go out at once, with all that came before them. (A line for each task, made
    and written at once, took about 20 µs of the front's 110 for the whole task.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if self.loop is None or threading.get_ident() != self._loop_thread:
            super().emit(record)
            return
        try:
            if not self._lines:
                self.loop.call_later(_BATCH_S, self.flush)
            self._lines.append(self.format(record) + self.terminator)
            if record.levelno >= logging.WARNING:
                self.flush()
        except Exception:  # noqa: BLE001 - what logging handlers do: report, and let the caller go on
            self.handleError(record)

    def write_lines(self, level: int, messages: list[str]) -> None:
        """Write what a record of each message would be, and now."""
        record = logger.makeRecord(logger.name, level, "", 0, "", (), None)
        for message in messages:
            record.msg = message
            self._lines.append(self.format(record) + self.terminator)
        self.flush()

    def use_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.flush()
        self.loop = loop
        self._loop_thread = threading.get_ident()

    def flush(self) -> None:
        self.acquire()  # threads of the source may log in this process, too
        try:
            lines, self._lines = self._lines, []
            if not self.stream:  # None: stderr was closed before Python began: there is no log
                return
            if lines:
                self.stream.write("".join(lines))
            super().flush()
        finally:
            self.release()


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()  # None: the descriptor was closed at exec


def _place(record: logging.LogRecord) -> str:
    """Tell which worker and task a record came from; nothing for the front's own."""
    slot = getattr(record, "slot", None)
    if slot is None:
        return ""
    address = getattr(record, "task_address", None)
    return f"[worker {slot}] " if address is None else f"[worker {slot} {address}] "


def configure_front(level: str | None, log_format: str) -> None:
    """Choose the format and the level of all that this process logs: the front, or a template.

    What the source has chosen at its import stays, where the settings do not say otherwise: a level
    of None, a format of ``auto``.
    """
    global _least_relayed  # noqa: PLW0603 - like the level of the logger
    colour = log_format == "auto" and _is_terminal(sys.stderr)
    if log_format != "auto" or isinstance(_handler.formatter, PlainFormatter):
        _handler.setFormatter(
            JsonFormatter() if log_format == "json" else PlainFormatter(colour=colour)
        )
    if level is not None:
        logger.setLevel(level)
        _least_relayed = logger.level
    logger.disabled = False  # a source's dictConfig() or fileConfig() disables it by default
    # uvicorn's complaints about broken connections and the like take the same way out.
    uvicorn_logger = logging.getLogger("uvicorn.error")
    uvicorn_logger.handlers = [_handler]
    uvicorn_logger.propagate = False


def batch_lines(loop: asyncio.AbstractEventLoop | None) -> None:
    """Gather lines on an event loop and write them together; None: write at once again."""
    # Facts that no format here shows, and that each record would be asked for (see "Optimization"
    # in the logging HOWTO). Not before the fork: the source's own formats may show them.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = loop is None
    logging._srcfile = _SOURCE_FILE if loop is None else None  # noqa: SLF001 - documented there
    _handler.use_loop(loop)


def relay(level: int, text: str, slot: int, task_address: str | None) -> None:
    """Log, in the front, what a worker has logged or printed.

    The worker's logger has judged it already, and handlers that the source has added to the logger
    have seen it there: the same handlers in this process are not to see it once more.
    """
    if level >= _least_relayed:
        place = {"slot": slot, "task_address": task_address}
        record = logger.makeRecord(logger.name, level, "", 0, "%s", (text,), None, extra=place)
        _handler.handle(record)


def log_successes(messages: list[str]) -> None:
    """Log at SUCCESS, all at once, in the front.

    Where nobody else looks at records, none is made for each: 0.8 µs a line instead of 4.1.
    """
    if not logger.isEnabledFor(SUCCESS_LEVEL):
        return
    if logger.handlers == [_handler] and not (logger.filters or _handler.filters or _sentry):
        _handler.write_lines(SUCCESS_LEVEL, messages)
        return
    for message in messages:
        logger.task_success("%s", message)


def configure_worker(level: str | None) -> None:
    """Hand records to the front as marked lines (called first thing in a worker).

    Args:
        level: the least that is logged; None: what the source has chosen.
    """
    _handler.setFormatter(_WorkerFormatter())
    if level is not None:
        logger.setLevel(level)
    logger.disabled = False  # see configure_front()


def enable_sentry() -> None:
    """Report failures and timeouts to Sentry when ``OGPU_SDK_SENTRY_DSN`` is set.

    Called after the fork, in the front and in each worker: the SDK's threads do not survive one.
    """
    global _sentry  # noqa: PLW0603 - one client a process, as sentry_sdk has it
    if not config.SENTRY_DSN:
        return
    try:
        import sentry_sdk  # noqa: PLC0415 - an extra, and only where it is asked for
    except ImportError:
        logger.warning(
            "OGPU_SDK_SENTRY_DSN is set, but sentry-sdk is not installed: "
            'pip install "ogpu-service[sentry]"'
        )
        return
    sentry_sdk.init(
        dsn=config.SENTRY_DSN,
        traces_sample_rate=0.1,
        environment="production",
        release=config.SDK_VERSION,
    )
    sentry_sdk.set_tag("source_address", config.SOURCE_ADDRESS)
    sentry_sdk.set_tag("provider_address", config.PROVIDER_ADDRESS)
    sentry_sdk.set_tag("protocol_version", config.PROTOCOL_VERSION)
    _sentry = sentry_sdk


def flush_sentry(timeout_s: float) -> None:
    """Wait until Sentry has been told everything (workers leave without running atexit)."""
    if _sentry is not None:
        _sentry.flush(timeout=timeout_s)


def _capture(message: object, args: tuple[object, ...], level: str) -> None:
    if _sentry is not None:
        text = str(message) % args if args else str(message)
        _sentry.capture_message(text, level=level)


def _make_logger() -> ServiceLogger:
    """Build the logger, and give the three methods to every other logger as the frozen one did."""
    for number, name in (
        (SUCCESS_LEVEL, "SUCCESS"),
        (TIMEOUT_LEVEL, "TIMEOUT"),
        (FAIL_LEVEL, "FAIL"),
    ):
        logging.addLevelName(number, name)
        method = f"task_{name.lower()}"
        setattr(logging.Logger, method, getattr(ServiceLogger, method))
    made = cast("ServiceLogger", logging.getLogger("ogpu.service"))
    made.propagate = False  # it formats for itself; "ogpu" belongs to the rest of that SDK
    made.setLevel(logging.INFO)
    if not made.handlers:
        made.addHandler(_handler)
    return made


_sentry: ModuleType | None = None
_least_relayed = logging.NOTSET
_handler = _BatchingHandler()
_handler.setFormatter(PlainFormatter(colour=_is_terminal(sys.stderr)))
logger = _make_logger()
