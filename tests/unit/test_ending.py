"""Ending asyncio tasks for good."""

from __future__ import annotations

import asyncio
import contextlib

from ogpu.service.ending import end_all


def test_a_task_that_swallows_a_cancellation_is_ended_all_the_same() -> None:
    """`asyncio.wait_for` of Python before 3.12 does that; one that raises does no harm."""
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed > 2:
                    raise

    async def failing() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        raise ValueError("too late")

    async def main() -> None:
        tasks = [asyncio.ensure_future(stubborn()), asyncio.ensure_future(failing())]
        await asyncio.sleep(0)
        await asyncio.wait_for(end_all(tasks), 10)
        assert all(task.done() for task in tasks)

    asyncio.run(main())
    assert swallowed == 3
