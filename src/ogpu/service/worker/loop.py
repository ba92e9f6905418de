"""A worker's life: @init once, then one task at a time until the front closes the channel.

Runs in a worker, on its main thread, whichever launcher made it:

1. Run @init; say Ready, or InitFailed and leave with exit code 1.
2. Wait for a Run. The end of the channel means: leave.
3. Validate the input, call the handler, serialise its result; say Done or Failed.
4. Whatever the handler raises, SystemExit included, fails its task only; go to 2.

A deadline is none of this file's business: the front kills the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator

from pydantic import BaseModel, ValidationError

from .. import wire
from ..context import CurrentTask, set_current_task
from ..errors import FailureReason, WireError
from ..handler import Handler, get_init_handler, registered
from ..logger import configure_worker, enable_sentry, flush_sentry, logger
from ..processes import zombie_children
from ..role import Role, set_role
from . import output
from .channel import Channel
from .progress import ProgressReporter

# What subprocesses of a handler know their task by; deployed sources read it already.
_ADDRESS_VARIABLE = "OGPU_TASK_ADDRESS"
_READ_BYTES = 256 * 1024
# Under load the next order comes within the time that the front needs for one task, and waking a
# worker that sleeps costs more than a small task: 6,300 tasks/s and 0.29 ms at concurrency 1
# without this, 9,000 and 0.14 ms with it (1 worker, 2 virtual cores). An idle worker sleeps, and
# where there are as many workers as cores none spins (2 workers: 8,200 tasks/s, 6,000 if they did).
_SPIN_S = 0.0002
# A worker adopts the orphans of its tasks' processes, so that none escapes its end; it cannot reap
# them, since some may be children that the source itself will wait for. It makes room by leaving.
_ZOMBIE_CHECK_TASKS = 50
_MAX_ZOMBIES = 500
_FRONT_INPUT_LIMIT = 2**32  # the front has checked OGPU_MAX_BODY_BYTES


class _InvalidInputError(Exception):
    """The input fitted the model when the task was accepted, and does not fit it now."""


class _InvalidOutputError(Exception):
    """The handler returned something that is not a usable result."""


def run_worker(launch: wire.Launch, channel: socket.socket) -> int:
    """Live as the worker that ``launch`` ordered; return the exit code."""
    set_role(Role.WORKER)
    configure_worker(launch.log_level)
    output.buffer_by_line()
    enable_sentry()
    worker = _Worker(Channel(channel), launch)
    if not worker.initialise():
        return 1
    worker.serve()
    flush_sentry(1.0)
    return 0


def report_init_failure(channel: socket.socket, error: BaseException) -> None:
    """Tell the front that the worker cannot start."""
    _tell_init_failure(Channel(channel), error)


def _tell_init_failure(channel: Channel, error: BaseException) -> None:
    name = _cut(type(error).__name__)
    channel.send(wire.InitFailed(name, _message_of(error), _traceback_of(error)))


class _Worker:
    def __init__(self, channel: Channel, launch: wire.Launch) -> None:
        self._channel = channel
        self._progress = ProgressReporter(channel)
        self._max_result_bytes = launch.max_result_bytes
        self._may_spin = launch.may_spin
        self._pid = os.getpid()
        self._tasks_done = 0
        self._handlers = registered()
        init = get_init_handler()
        is_async = any(h.is_async for h in self._handlers.values())
        # One loop for the whole life: clients that an async @init made belong to it.
        self._loop = (
            asyncio.new_event_loop() if is_async or inspect.iscoroutinefunction(init) else None
        )
        if self._loop is not None:
            asyncio.set_event_loop(self._loop)

    def initialise(self) -> bool:
        started = time.perf_counter()
        init = get_init_handler()
        if init is not None:
            try:
                self._call(init)
                if os.getpid() != self._pid:
                    os._exit(0)  # a child that @init forked
            except BaseException as error:  # noqa: BLE001 - told to the front, which decides
                if os.getpid() != self._pid:
                    os._exit(1)
                _tell_init_failure(self._channel, error)
                return False
            finally:
                output.flush()
        init_s = time.perf_counter() - started
        self._channel.send(wire.Ready(wire.PROTOCOL_VERSION, list(self._handlers), init_s))
        return True

    def serve(self) -> None:
        for message, payload in self._frames():
            if not isinstance(message, wire.Run):
                raise WireError(f"a worker cannot do {message}")
            self._begin(message)
            answer, result = self._run(message, payload)
            if os.getpid() != self._pid:
                # The handler forked, and this is the child, which must not answer for its parent.
                os._exit(0 if isinstance(answer, wire.Done) else 1)
            self._end()
            self._channel.send(answer, result)
            self._tasks_done += 1
            if self._tasks_done % _ZOMBIE_CHECK_TASKS == 0 and zombie_children() > _MAX_ZOMBIES:
                logger.warning("More than %d zombies were left here by tasks", _MAX_ZOMBIES)
                return

    def _frames(self) -> Iterator[tuple[wire.Message, bytes]]:
        decoder = wire.FrameDecoder(_FRONT_INPUT_LIMIT)
        while True:
            data = self._read_soon()
            if data is None:
                if self._loop is not None:  # background tasks of the source run on meanwhile
                    self._loop.run_until_complete(_readable(self._channel.socket))
                data = self._channel.socket.recv(_READ_BYTES)
            if not data:
                return
            yield from decoder.feed(data)

    def _read_soon(self) -> bytes | None:
        """Look for the next order for a moment, without going to sleep; None: nothing came."""
        if not self._may_spin:
            return None
        limit = time.perf_counter() + _SPIN_S
        while time.perf_counter() < limit:
            try:
                return self._channel.socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                os.sched_yield()  # to whoever else wants this core
        return None

    def _begin(self, order: wire.Run) -> None:
        self._progress.begin(order.run)
        set_current_task(
            CurrentTask(
                order.task_address,
                order.function,
                order.attempt,
                order.deadline_at,
                order.deadline_s,
                functools.partial(self._progress.report, order.run),
            )
        )
        os.environ[_ADDRESS_VARIABLE] = order.task_address

    def _end(self) -> None:
        set_current_task(None)
        with contextlib.suppress(KeyError):  # a handler may have cleared it
            del os.environ[_ADDRESS_VARIABLE]
        self._progress.end()

    def _run(self, order: wire.Run, input_json: bytes) -> tuple[wire.Done | wire.Failed, bytes]:
        handler = self._handlers[order.function]
        try:
            result = self._call(handler.function, _read_input(handler, input_json))
            result_json = self._serialise(handler, result)
        except _InvalidInputError as error:
            reason = FailureReason.EXCEPTION.value
            return wire.Failed(order.run, reason, str(error), "ValidationError", None), b""
        except _InvalidOutputError as error:
            output.flush()
            return _failed(order, FailureReason.INVALID_OUTPUT, error, with_traceback=False), b""
        except BaseException as error:  # noqa: BLE001 - any of them ends this task, and only it
            output.flush()
            return _failed(order, FailureReason.EXCEPTION, error), b""
        output.flush()
        return wire.Done(order.run, output.is_pending()), result_json

    def _call(self, function: Callable[..., object], *arguments: BaseModel) -> object:
        result = function(*arguments)
        if self._loop is not None and inspect.isawaitable(result):
            return self._loop.run_until_complete(_awaited(result))
        return result

    def _serialise(self, handler: Handler, result: object) -> bytes:
        name, wanted = handler.name, handler.output_model.__name__
        if not isinstance(result, handler.output_model):
            given = "None" if result is None else f"a {type(result).__name__}"
            raise _InvalidOutputError(f"`{name}` returned {given}; {wanted} was declared")
        try:
            serialised = result.model_dump_json().encode()
        except Exception as error:
            raise _InvalidOutputError(
                f"the result of `{name}` cannot be written as JSON: {_message_of(error)}"
            ) from error
        if len(serialised) > self._max_result_bytes:
            raise _InvalidOutputError(
                f"the result of `{name}` has {len(serialised)} bytes; "
                f"OGPU_MAX_RESULT_BYTES allows {self._max_result_bytes}"
            )
        return serialised


def _read_input(handler: Handler, input_json: bytes) -> BaseModel:
    """Validate again: the front, which did so already, may have been one of an older source."""
    try:
        return handler.input_model.model_validate_json(input_json)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        what = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems)
        raise _InvalidInputError(
            f"the input does not fit the input model of `{handler.name}` any more: {what}"
        ) from None


async def _awaited(result: Awaitable[object]) -> object:
    return await result


async def _readable(channel: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(channel, readable.set_result, None)
    try:
        await readable
    finally:
        loop.remove_reader(channel)


def _failed(
    order: wire.Run, reason: FailureReason, error: BaseException, *, with_traceback: bool = True
) -> wire.Failed:
    return wire.Failed(
        run=order.run,
        reason=reason.value,
        message=_message_of(error),
        exception=_cut(type(error).__name__) if with_traceback else None,
        traceback=_traceback_of(error) if with_traceback else None,
    )


def _message_of(error: BaseException) -> str:
    """Return the exception's text, whatever its ``__str__`` does."""
    try:
        text = str(error)
    except BaseException as broken:  # noqa: BLE001 - a user's __str__ may raise anything
        text = f"(its text cannot be shown: {type(broken).__name__})"
    return _cut(text or type(error).__name__)


def _traceback_of(error: BaseException) -> str:
    """Return the traceback as text, from the source's first frame on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals is globals():
        frames = frames.tb_next
    return _cut("".join(traceback.format_exception(type(error), error, frames)))


def _cut(text: str) -> str:
    """Keep the end, which says what happened, and what UTF-8 can say."""
    if len(text) > wire.MAX_TEXT_CHARS:
        text = "…" + text[-wire.MAX_TEXT_CHARS :]
    return text.encode("utf-8", "backslashreplace").decode()
