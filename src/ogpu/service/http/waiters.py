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

    def on_transition(self, task: Task) -> None:
        if task.state.is_terminal:
            self.wake(task)

    def wake(self, task: Task) -> None:
        """Let the requests go on that wait for a task."""
        for future in self._futures.pop(task.number, ()):
            _end(future, True)

    def release(self) -> None:
        """Let every request go on now: the service ends before their tasks do."""
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
        if await self._is_woken(task, min(timeout_s, _UNWATCHED_S)) or timeout_s <= _UNWATCHED_S:
            return task.state.is_terminal
        # (What ends soon is not worth two tasks of the loop.)
        ending = asyncio.ensure_future(self._is_woken(task, timeout_s - _UNWATCHED_S))
        leaving = asyncio.ensure_future(_leave(receive))
        try:
            await asyncio.wait([ending, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                raise DisconnectedError
        finally:
            await end_all([ending, leaving])
        return task.state.is_terminal

    async def _is_woken(self, task: Task, timeout_s: float) -> bool:
        """Wait for ``wake`` or ``release``; return False when there was none in that time."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        futures = self._futures.setdefault(task.number, [])
        futures.append(future)
        timer = loop.call_later(timeout_s, _end, future, False)
        try:
            return await future
        finally:
            timer.cancel()
            futures.remove(future)
            if not futures:
                self._futures.pop(task.number, None)


async def _leave(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


def _end(future: asyncio.Future[bool], is_woken: bool) -> None:
    if not future.done():
        future.set_result(is_woken)
