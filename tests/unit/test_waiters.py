"""Requests that wait for the end of a task."""

from __future__ import annotations

import asyncio

import pytest

from ogpu.service.http import waiters as waiters_module
from ogpu.service.http.waiters import Waiters
from ogpu.service.task import Task, TaskState


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}


@pytest.mark.parametrize("what", ["ends", "released"])
def test_what_happens_as_the_first_second_is_over_is_not_missed(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A task that ends in the loop's step in which the wait goes on is seen to have ended."""
    monkeypatch.setattr(waiters_module, "_UNWATCHED_S", 0.01)

    async def main() -> bool:
        waiters, task = Waiters(), Task(1, "x", "f", "a", b"{}", state=TaskState.RUNNING)

        def end() -> None:
            if what == "released":
                waiters.release()
            else:
                task.advance(TaskState.SUCCEEDED)
                waiters.on_transition(task)

        waiting = asyncio.ensure_future(waiters.wait(task, 60, never))
        await asyncio.sleep(0)  # the wait has begun, and its timer runs
        (future,) = waiters._futures[1]
        future.add_done_callback(lambda _: end())
        return await asyncio.wait_for(waiting, 5)

    assert asyncio.run(main()) is (what == "ends")
