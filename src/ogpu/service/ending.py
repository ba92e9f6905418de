"""Ending asyncio tasks for good. A leaf, used in the front."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_AGAIN_S = 0.1


async def end_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended, whatever they raise.

    Before Python 3.12 ``asyncio.wait_for`` swallows a cancellation that comes together with what it
    waited for (python/cpython#86296), so one cancellation may not be enough.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=_AGAIN_S)
        for task in done:
            if not task.cancelled():
                task.exception()  # asked for, so that it is not reported as never retrieved
