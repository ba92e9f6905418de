"""Work that nobody awaits: started, kept, cancelled at the end; its failures are reported.

Runs in the front.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from ..ending import end_all
from ..logger import logger


class Background:
    """Runs coroutines beside the caller; ``on_failure`` is told of an exception that left one."""

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, work: Coroutine[object, object, None]) -> None:
        """Start it now."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def call_later(
        self, delay_s: float, function: Callable[..., None], *arguments: object
    ) -> asyncio.TimerHandle:
        """Call a function later, guarded."""
        loop = asyncio.get_running_loop()
        return loop.call_later(delay_s, self.guard, function, *arguments)

    def guard(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a callback of the event loop, which would only log what it raises."""
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 - any defect is to be told
            logger.critical("A callback of the pool failed", exc_info=error)
            self._on_failure(error)

    async def cancel(self) -> None:
        """End what still runs, and wait for it."""
        await end_all(list(self._tasks))

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.critical("A background task of the pool failed", exc_info=error)
            self._on_failure(error)
