"""Requests that wait for the end of a task. Runs in the front.

One timer serves all of them, since a timer for each, which is nearly always called off, cost more
than all the rest of waiting. It looks at those who wait no oftener than every LOOK_S, so a time-out
may be that late.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable

from starlette.types import Receive

from ..ending import end_all
from ..task import Task
from .inputs import DisconnectedError

LOOK_S = 0.02


class Waiting:
    """One request that waits; it is over when it was let go, or dropped."""

    __slots__ = ("is_over", "limit_s", "number", "then")

    def __init__(self, number: int, then: Callable[[], None], limit_s: float) -> None:
        self.number = number
        self.then = then
        self.limit_s = limit_s  # on the loop's clock
        self.is_over = False


class Waiters:
    """Requests that wait for the end of a task (a listener of the journal)."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, list[Waiting]] = {}  # by the number of the task
        self._timer: asyncio.TimerHandle | None = None
        self._rings_s = math.inf

    def wake(self, task: Task) -> None:
        """Let the requests go on that wait for a task."""
        for waiting in self._waiting.get(task.number, ())[:]:
            self._let_go(waiting)

    def release(self) -> None:
        """Let every request go on now: the service ends before their tasks do."""
        self._let_go_until(math.inf)

    def call(self, task: Task, timeout_s: float, then: Callable[[], None]) -> Waiting:
        """Have ``then`` called at a task's end, or after so long, or when all are released.

        It is called once, not before this has returned, and not after ``drop``.
        """
        if task.state.is_terminal:
            timeout_s = 0.0
        waiting = Waiting(task.number, then, self._loop.time() + timeout_s)
        self._waiting.setdefault(task.number, []).append(waiting)
        if waiting.limit_s < self._rings_s:
            self._set_timer(waiting.limit_s)
        return waiting

    def drop(self, waiting: Waiting) -> None:
        """Forget a request: whoever made it has gone, or knows."""
        if waiting.is_over:
            return
        waiting.is_over = True
        same_task = self._waiting[waiting.number]
        same_task.remove(waiting)
        if not same_task:
            del self._waiting[waiting.number]

    async def wait(self, task: Task, timeout_s: float, receive: Receive) -> bool:
        """Wait for a task's end, for so long at most; return whether it has ended.

        Raises:
            DisconnectedError: the client went away, and nobody waits any more.
        """
        if task.state.is_terminal:
            return True
        woken: asyncio.Future[None] = self._loop.create_future()
        waiting = self.call(task, timeout_s, functools.partial(_end, woken))
        leaving = asyncio.ensure_future(_leave(receive))
        try:
            await asyncio.wait([woken, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not woken.done():
                raise DisconnectedError
        finally:
            self.drop(waiting)
            await end_all([leaving])
        return task.state.is_terminal

    def _let_go(self, waiting: Waiting) -> None:
        if not waiting.is_over:  # what another one did when it was let go may have dropped this
            self.drop(waiting)
            waiting.then()

    def _let_go_until(self, limit_s: float) -> None:
        """Let those go whose time is over by then."""
        everyone = [one for many in self._waiting.values() for one in many]
        for waiting in everyone:
            if waiting.limit_s <= limit_s:
                self._let_go(waiting)

    def _set_timer(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_s = at_s
        self._timer = self._loop.call_at(at_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._rings_s = None, math.inf
        now_s = self._loop.time()
        self._let_go_until(now_s)
        if self._waiting:
            first_s = min(one.limit_s for many in self._waiting.values() for one in many)
            self._set_timer(max(first_s, now_s + LOOK_S))


async def _leave(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


def _end(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
