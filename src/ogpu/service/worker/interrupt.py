"""Asking a handler to stop: TaskTimeout is raised in it, where there is a grace after the deadline.

Runs in a worker, on its main thread. The front sends ASK_SIGNAL at the deadline:

1. It is ignored unless code of the source runs for a task that is past its deadline, and only once
   in a task: a signal that comes late means the task before. In a child that the handler has forked
   it means nothing.
2. Where Python code runs, or a call that a signal can interrupt (a sleep, a lock, a pipe),
   TaskTimeout is raised right there. In a call that does not come back, and holds the interpreter,
   it is not: that is what the kill at the end of the grace is for.
3. An ``async def`` handler that waits is woken up by a cancellation, which is TaskTimeout by the
   time the handler sees it. Where it computes between two awaits, 2. holds.
4. While code of ours runs that must not be cut in two (a report on its way to the front), it is
   put off until that is done.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from types import FrameType
from typing import Any

from .. import wire
from ..context import TaskTimeout

_MESSAGE = "the task is past its deadline"


class Interrupt:
    """Raises TaskTimeout in the handler of the running task; one for a worker's whole life.

    Make it on the main thread: that is where Python runs signal handlers.
    """

    def __init__(self) -> None:
        self.was_raised = False  # in the present task, or the last one
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._deadline_s: float | None = None  # None: nobody is to be asked
        self._waiter: _Interruptible | None = None
        self._is_held = self._is_due = False
        signal.signal(wire.ASK_SIGNAL, self._on_signal)

    def open(self, order: wire.Run) -> None:
        """Let the handler be asked from now on, if there is a grace.

        TaskTimeout can come out of every call between this one and ``close``, these two included:
        call them where it is caught.
        """
        self._waiter = None
        self.was_raised = self._is_held = self._is_due = False
        self._deadline_s = order.deadline_s if order.may_be_asked else None

    def close(self) -> None:
        """Have nobody asked any more."""
        self._deadline_s = None

    def run(
        self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, object]
    ) -> object:
        """Run a coroutine to its end, in such a way that it can be asked where it waits."""
        if self._deadline_s is None:
            return loop.run_until_complete(coroutine)
        self._waiter = _Interruptible(loop, coroutine)
        try:
            return loop.run_until_complete(self._waiter.task)
        finally:
            self._waiter = None

    def put_off(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function of ours that must not be cut in two; be asked after it."""
        if threading.get_ident() != self._thread:
            function(*arguments)
            return
        self._is_held = True
        try:
            function(*arguments)
        finally:
            self._is_held = False
        if self._is_due:
            self._ask()

    def _on_signal(self, _: int, __: FrameType | None) -> None:
        deadline_s = self._deadline_s
        if deadline_s is None or time.monotonic() < deadline_s or os.getpid() != self._pid:
            return
        if self._is_held:
            self._is_due = True
        else:
            self._ask()

    def _ask(self) -> None:
        self._deadline_s = None  # once
        self._is_due = False
        self.was_raised = True
        if self._waiter is None:
            raise TaskTimeout(_MESSAGE)
        if self._waiter.is_running:
            raise _Cancelled(_MESSAGE)
        self._waiter.interrupt()


class _Cancelled(TaskTimeout, asyncio.CancelledError):
    """TaskTimeout inside a coroutine.

    It is a cancellation as well, so that what ends with those ends with it: wait_for() of Python
    3.10 and 3.11 left its task running otherwise, and a TaskGroup raised a group.
    """


class _Interruptible(Coroutine[Any, Any, object]):
    """A coroutine in an asyncio task that can be woken up by TaskTimeout, once."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, object]
    ) -> None:
        self._loop = loop
        self._coroutine: Any = coroutine  # one of `async def`, which tells what it is doing
        self._is_due = False
        self.task = loop.create_task(self)

    @property
    def is_running(self) -> bool:
        """True while a step of it runs; what is raised in a signal handler then ends that step."""
        return bool(self._coroutine.cr_running)

    def interrupt(self) -> None:
        """Raise TaskTimeout where it waits. Safe in a signal handler."""
        self._is_due = True
        self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._is_due:  # it may have been woken up by what it waited for
            self.task.cancel()

    def send(self, value: object) -> object:
        return self._step(self._coroutine.send, value)

    def throw(self, *error: object) -> object:
        return self._step(self._coroutine.throw, *error)

    def _step(self, resume: Callable[..., object], *arguments: object) -> object:
        if self._is_due and self._coroutine.cr_await is not None:
            self._is_due = False
            if sys.version_info >= (3, 11):
                self.task.uncancel()  # the handler may go on: it is not being cancelled
            resume, arguments = self._coroutine.throw, (_Cancelled(_MESSAGE),)
        try:
            return resume(*arguments)
        except _Cancelled as error:
            raise TaskTimeout(_MESSAGE).with_traceback(error.__traceback__) from None

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, object]:
        steps: Generator[Any, Any, object] = self._coroutine.__await__()
        return steps
