"""Requests that wait for the end of a task. Runs in the front."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from ..ending import end_all
from ..task import Task
from .inputs import DisconnectedError

_UNWATCHED_S = 1.0


class Waiters:
    """Requests that wait for the end of a task (a listener of the journal)."""

    def __init__(self) -> None:
        self._futures: dict[int, list[asyncio.Future[bool]]] = {}
        self._is_released = False

    def on_transition(self, task: Task) -> None:
        if task.state.is_terminal:
            self.wake(task)

    def wake(self, task: Task) -> None:
        """Let the requests go on that wait for a task."""
        for future in self._futures.pop(task.number, ()):
            _end(future, True)

    def release(self) -> None:
        """Let every request go on now: the service ends before their tasks do."""
        self._is_released = True
        for futures in self._futures.values():
            for future in futures:
                _end(future, True)

    async def wait(self, task: Task, timeout_s: float, receive: Receive) -> bool:
        """Wait for a task's end, for so long at most; return whether it has ended.

        Raises:
            DisconnectedError: the client went away, and nobody waits any more.
        """
        if task.state.is_terminal:
            return True
        first_s = min(timeout_s, _UNWATCHED_S)
        if await self._is_woken(task, self._register(task), first_s) or timeout_s <= first_s:
            return task.state.is_terminal
        if task.state.is_terminal or self._is_released:  # between the timer and this line
            return task.state.is_terminal
        # (What ends soon is not worth two tasks of the loop.)
        woken = self._is_woken(task, self._register(task), timeout_s - first_s)
        ending = asyncio.ensure_future(woken)
        leaving = asyncio.ensure_future(_leave(receive))
        try:
            await asyncio.wait([ending, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                raise DisconnectedError
        finally:
            await end_all([ending, leaving])
        return task.state.is_terminal

    def _register(self, task: Task) -> asyncio.Future[bool]:
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._futures.setdefault(task.number, []).append(future)
        return future

    async def _is_woken(self, task: Task, future: asyncio.Future[bool], timeout_s: float) -> bool:
        """Wait for ``wake`` or ``release``; return False when there was none in that time."""
        timer = asyncio.get_running_loop().call_later(timeout_s, _end, future, False)
        try:
            return await future
        finally:
            timer.cancel()
            futures = self._futures.get(task.number, [])
            if future in futures:
                futures.remove(future)
                if not futures:
                    del self._futures[task.number]


async def _leave(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


def _end(future: asyncio.Future[bool], is_woken: bool) -> None:
    if not future.done():
        future.set_result(is_woken)
