"""A worker's life: @init once, then one task or batch at a time until the channel is closed.

Runs in a worker, on its main thread, whichever launcher made it:

1. Run @init, then each handler that has a warm-up, once (``warmup.py``); say Ready, or InitFailed
   and leave with exit code 1.
2. Wait for a Run, and for those that follow it in the same batch. The end of the channel means:
   leave.
3. Run the task, or the batch (``handling.py``); look whether the worker is fit for another
   (``fitness.py``); say Done or Failed of each, and with the last one that the worker wants to be
   replaced, where it is not.
4. Where it is, and an order ahead is there (``ahead.py``), take that, say so with the answer, and
   go to 3. Otherwise go to 2.

A deadline is none of this file's business: the front kills the process, after it has had the
handler asked to stop (``interrupt.py``) where there is a grace.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import socket
import time
from collections.abc import Iterator, Mapping

from .. import wire
from ..context import ADDRESS_VARIABLE, CurrentTask, set_current_tasks
from ..errors import WireError
from ..handler import Handler, get_init_handler, registered
from ..logger import configure_worker, enable_sentry, flush_sentry, logger
from ..processes import zombie_children
from ..role import Role, set_role
from . import output
from .ahead import OrdersAhead
from .channel import Channel
from .failure import init_failed
from .fitness import Fitness
from .handling import Handling, Order
from .interrupt import Interrupt
from .progress import ProgressReporter
from .warmup import warm_up

# Under load the next order comes within the time that the front needs for one task, and waking a
# worker that sleeps costs more than a small task: 6,300 tasks/s and 0.29 ms at concurrency 1
# without this, 9,000 and 0.14 ms with it (1 worker, 2 virtual cores). An idle worker sleeps, and
# where as many workers as cores were busy when it got its order it does not spin (2 workers: 8,200
# tasks/s, 6,000 if they did). The front says so with each order.
_SPIN_S = 0.0002
# A worker adopts the orphans of its tasks' processes, so that none escapes its end; it cannot reap
# them, since some may be children that the source itself will wait for. It makes room by leaving.
_ZOMBIE_CHECK_RUNS = 50
_MAX_ZOMBIES = 500
_FRONT_INPUT_LIMIT = 2**32  # the front has checked OGPU_MAX_BODY_BYTES


def run_worker(launch: wire.Launch, channel: socket.socket) -> int:
    """Live as the worker that ``launch`` ordered; return the exit code."""
    become_worker(launch)
    enable_sentry()
    handlers = registered()
    worker = Worker(Channel(channel), launch, handlers, _loop_for(handlers))
    if not worker.initialise():
        return 1
    worker.serve(output.StandardDescriptors())
    flush_sentry(1.0)
    return 0


def become_worker(launch: wire.Launch) -> None:
    """Let this process be a worker by its role, its log and its output."""
    set_role(Role.WORKER)
    configure_worker(launch.log_level)
    output.buffer_by_line()


def report_init_failure(channel: socket.socket, error: BaseException) -> None:
    """Tell the front that the worker cannot start."""
    Channel(channel).send(init_failed(error))


def _loop_for(handlers: Mapping[str, Handler]) -> asyncio.AbstractEventLoop | None:
    """Return one loop for the whole life: clients that an async @init made belong to it."""
    init = get_init_handler()
    if not any(h.is_async for h in handlers.values()) and not inspect.iscoroutinefunction(init):
        return None
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


class Worker:
    """Runs @init, and then tasks; ``loop`` is for what is async, where anything is."""

    def __init__(
        self,
        channel: Channel,
        launch: wire.Launch,
        handlers: Mapping[str, Handler],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self._channel = channel
        self._progress = ProgressReporter(channel)
        self._may_spin = False  # as the last order said
        self._pid = os.getpid()
        self._runs_done = 0
        self._handlers = handlers
        self._loop = loop
        self._interrupt = Interrupt()
        self._handling = Handling(self._loop, self._interrupt, launch.max_result_bytes)
        self._fitness = Fitness(self._loop, self._interrupt, launch.max_rss_bytes)

    def initialise(self) -> bool:
        """Run @init and the warm-ups, and tell how that ended; return whether all went well."""
        started = time.perf_counter()
        failure = self._run_init() or warm_up(self._handling, self._handlers)
        if failure is not None:
            self._channel.send(failure)
            return False
        self.tell_ready(time.perf_counter() - started)
        return True

    def tell_ready(self, init_s: float) -> None:
        """Say that tasks are taken."""
        self._channel.send(wire.Ready(wire.PROTOCOL_VERSION, list(self._handlers), init_s))

    def _run_init(self) -> wire.InitFailed | None:
        init = get_init_handler()
        if init is None:
            return None
        try:
            self._handling.call(init)
            if os.getpid() != self._pid:
                os._exit(0)  # a child that @init forked
        except BaseException as error:  # noqa: BLE001 - told to the front, which decides
            if os.getpid() != self._pid:
                os._exit(1)
            return init_failed(error)
        finally:
            output.flush()
        return None

    def serve(self, standard: output.StandardDescriptors) -> None:
        """Run what is ordered, until the channel ends."""
        with contextlib.closing(OrdersAhead(self._channel.socket)) as ahead:
            self._serve(ahead, standard)

    def _serve(self, ahead: OrdersAhead, standard: output.StandardDescriptors) -> None:
        incoming = self._orders()
        orders = next(incoming, None)
        while orders is not None:
            handler = self._handlers[orders[0][0].function]
            self._begin([order for order, _ in orders], is_batch=handler.batching is not None)
            answers = self._handling.run(handler, orders)
            if os.getpid() != self._pid:
                # The handler forked, and this is the child, which must not answer for its parent.
                os._exit(0 if all(isinstance(answer, wire.Done) for answer, _ in answers) else 1)
            self._end()
            standard.restore()
            reason = self._fitness.judge([answer for answer, _ in answers])
            last, _ = answers[-1]
            if reason is not None:
                last.recycle = reason.value
            is_last = self._has_too_many_zombies()
            # What was printed is read with the answer, and must not be mixed with what follows.
            taken = None
            if isinstance(last, wire.Done) and not (reason or is_last or last.has_output):
                taken = ahead.take()
                last.took = None if taken is None else taken[0].run
            for answer, result in answers:
                self._channel.send(answer, result)
            if is_last:
                return
            orders = next(incoming, None) if taken is None else [taken]

    def _has_too_many_zombies(self) -> bool:
        self._runs_done += 1
        if self._runs_done % _ZOMBIE_CHECK_RUNS != 0 or zombie_children() <= _MAX_ZOMBIES:
            return False
        logger.warning("More than %d zombies were left here by tasks", _MAX_ZOMBIES)
        return True

    def _orders(self) -> Iterator[list[Order]]:
        orders: list[Order] = []
        for message, payload in self._frames():
            if not isinstance(message, wire.Run):
                raise WireError(f"a worker cannot do {message}")
            orders.append((message, payload))
            self._may_spin = message.may_spin
            if not message.more:
                yield orders
                orders = []

    def _frames(self) -> Iterator[tuple[wire.Message, bytes]]:
        decoder = wire.FrameDecoder(_FRONT_INPUT_LIMIT)
        while count := self._read(decoder):
            yield from decoder.filled(count)

    def _read(self, decoder: wire.FrameDecoder) -> int:
        """Wait for something to read; return how much it was, 0 at the end of the channel."""
        channel, buffer = self._channel.socket, decoder.buffer()
        if decoder.is_in_large_payload and self._loop is None:
            return channel.recv_into(buffer, 0, socket.MSG_WAITALL)
        count = self._read_soon(buffer)
        if count is None:
            if self._loop is not None:  # background tasks of the source run on meanwhile
                _run_until_readable(self._loop, channel)
            count = channel.recv_into(buffer)
        return count

    def _read_soon(self, buffer: memoryview) -> int | None:
        """Look for the next order for a moment, without going to sleep; None: nothing came."""
        if not self._may_spin:
            return None
        limit = time.perf_counter() + _SPIN_S
        while time.perf_counter() < limit:
            try:
                return self._channel.socket.recv_into(buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                os.sched_yield()  # to whoever else wants this core
        return None

    def _begin(self, orders: list[wire.Run], *, is_batch: bool) -> None:
        self._progress.begin({order.run for order in orders})
        set_current_tasks([self._current_task(order) for order in orders], is_batch=is_batch)
        self._fitness.begin(orders[0])
        if not is_batch:
            os.environ[ADDRESS_VARIABLE] = orders[0].task_address

    def _current_task(self, order: wire.Run) -> CurrentTask:
        return CurrentTask(
            order.task_address,
            order.function,
            order.attempt,
            order.deadline_at,
            order.deadline_s,
            functools.partial(self._interrupt.put_off, self._progress.report, order.run),
        )

    def _end(self) -> None:
        set_current_tasks([])
        with contextlib.suppress(KeyError):  # a handler may have cleared it
            del os.environ[ADDRESS_VARIABLE]
        self._progress.end()


def _run_until_readable(loop: asyncio.AbstractEventLoop, channel: socket.socket) -> None:
    """Run a loop without a coroutine of ours, which would take more turns of it.

    (Its ``stop`` alone would do for asyncio; uvloop would keep one that was called twice for the
    next time.)
    """
    descriptor = channel.fileno()  # by the socket itself asyncio makes a text of it, to no use
    readable = loop.create_future()

    def note() -> None:
        loop.remove_reader(descriptor)
        readable.set_result(None)

    loop.add_reader(descriptor, note)
    try:
        loop.run_until_complete(readable)
    finally:
        loop.remove_reader(descriptor)
