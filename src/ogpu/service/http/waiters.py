"""Requests that wait for the end of a task. Runs in the front.

A time-out is up to TICK_S late: those that fall into the same tick share one timer, since a timer
for each request, which is nearly always called off, cost more than all the rest of waiting.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

from starlette.types import Receive

from ..ending import end_all
from ..task import Task
from .inputs import DisconnectedError

TICK_S = 0.02


class Waiting:
    """One request that waits; it is over when it was let go, or dropped."""

    __slots__ = ("is_over", "number", "then", "tick")

    def __init__(self, number: int, then: Callable[[], None], tick: int) -> None:
        self.number = number
        self.then = then
        self.tick = tick
        self.is_over = False


_Set = dict[Waiting, None]  # in their order


class Waiters:
    """Requests that wait for the end of a task (a listener of the journal)."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._by_number: dict[int, _Set] = {}
        self._by_tick: dict[int, _Set] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_tick = 0

    def on_transition(self, task: Task) -> None:
        if task.number in self._by_number and task.state.is_terminal:
            self.wake(task)

    def wake(self, task: Task) -> None:
        """Let the requests go on that wait for a task."""
        for waiting in list(self._by_number.get(task.number, ())):
            self._let_go(waiting)

    def release(self) -> None:
        """Let every request go on now: the service ends before their tasks do."""
        for waiting in [one for many in self._by_number.values() for one in many]:
            self._let_go(waiting)

    def call(self, task: Task, timeout_s: float, then: Callable[[], None]) -> Waiting:
        """Have ``then`` called at a task's end, or after so long, or when all are released.

        It is called once, not before this has returned, and not after ``drop``.
        """
        if task.state.is_terminal:
            timeout_s = 0.0
        tick = int((self._loop.time() + timeout_s) / TICK_S) + 1
        waiting = Waiting(task.number, then, tick)
        self._by_number.setdefault(task.number, {})[waiting] = None
        self._by_tick.setdefault(tick, {})[waiting] = None
        if self._timer is None or tick < self._timer_tick:
            self._set_timer(tick)
        return waiting

    def drop(self, waiting: Waiting) -> None:
        """Forget a request: whoever made it has gone, or knows."""
        if waiting.is_over:
            return
        waiting.is_over = True
        _remove(self._by_number, waiting.number, waiting)
        _remove(self._by_tick, waiting.tick, waiting)

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

    def _set_timer(self, tick: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_tick = tick
        self._timer = self._loop.call_at(tick * TICK_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._loop.time()
        due = [tick for tick in self._by_tick if tick * TICK_S <= now]
        for waiting in [one for tick in due for one in self._by_tick[tick]]:
            self._let_go(waiting)
        if self._by_tick:
            self._set_timer(min(self._by_tick))


def _remove(sets: dict[int, _Set], key: int, waiting: Waiting) -> None:
    """Take a request out of a set, and the set away when it is empty."""
    members = sets[key]
    del members[waiting]
    if not members:
        del sets[key]


async def _leave(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


def _end(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
