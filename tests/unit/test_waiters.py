"""Requests that wait for the end of a task."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

import pytest

from ogpu.service.http.inputs import DisconnectedError
from ogpu.service.http.waiters import LOOK_S, Waiters
from ogpu.service.task import Task, TaskState


def a_task(number: int = 1) -> Task:
    return Task(number, "x", "f", "a", b"{}", state=TaskState.RUNNING)


def end(waiters: Waiters, task: Task) -> None:
    task.advance(TaskState.SUCCEEDED)
    waiters.wake(task)


async def never() -> dict[str, str]:
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}


async def gone() -> dict[str, str]:
    return {"type": "http.disconnect"}


def test_all_who_wait_for_a_task_are_called_once_when_it_ends() -> None:
    """Its end calls each of them; a release after it, or a second end of another task, does not."""

    async def main() -> list[str]:
        waiters, task, other, called = Waiters(), a_task(), a_task(2), list[str]()
        for name in ("a", "b"):
            waiters.call(task, 60, functools.partial(called.append, name))
        waiters.call(other, 60, functools.partial(called.append, "other"))
        end(waiters, task)
        assert called == ["a", "b"]
        waiters.release()
        waiters.release()
        return called

    assert asyncio.run(main()) == ["a", "b", "other"]


@pytest.mark.parametrize("what", ["wake", "release", "timer"])
def test_who_was_dropped_is_not_called(what: str) -> None:
    """Not even where it is dropped by what another one does that is let go with it."""

    async def main() -> list[str]:
        waiters, task, called = Waiters(), a_task(), list[str]()

        def drop_the_other() -> None:
            called.append("first")
            waiters.drop(other)

        timeout_s = 0.0 if what == "timer" else 60
        waiters.call(task, timeout_s, drop_the_other)
        other = waiters.call(task, timeout_s, lambda: called.append("other"))
        if what == "timer":
            await asyncio.sleep(5 * LOOK_S)
        elif what == "wake":
            end(waiters, task)
        else:
            waiters.release()
        assert not waiters._waiting
        return called

    assert asyncio.run(main()) == ["first"]


@pytest.mark.parametrize("timeouts_s", [(0.03, 0.1), (0.1, 0.03)], ids=["in order", "shorter last"])
def test_a_timeout_is_never_early_and_at_most_a_little_late(
    timeouts_s: tuple[float, float],
) -> None:
    async def main() -> dict[float, float]:
        waiters, loop = Waiters(), asyncio.get_running_loop()
        took_s: dict[float, float] = {}
        started = loop.time()
        over = asyncio.Event()

        def note(timeout_s: float) -> None:
            took_s[timeout_s] = loop.time() - started
            if len(took_s) == len(timeouts_s):
                over.set()

        for timeout_s in timeouts_s:
            waiters.call(a_task(), timeout_s, functools.partial(note, timeout_s))
        await asyncio.wait_for(over.wait(), 5)
        return took_s

    for timeout_s, took_s in asyncio.run(main()).items():
        assert timeout_s <= took_s <= timeout_s + 1.0


def test_a_task_that_has_ended_already_is_told_a_moment_later() -> None:
    """Never before ``call`` has returned."""

    async def main() -> None:
        waiters, task, called = Waiters(), a_task(), asyncio.Event()
        task.advance(TaskState.SUCCEEDED)
        waiters.call(task, 60, called.set)
        assert not called.is_set()
        await asyncio.wait_for(called.wait(), 5)

    asyncio.run(main())


@pytest.mark.parametrize("what", ["ends", "released"])
def test_a_coroutine_waits_as_well(what: str) -> None:
    """It returns whether the task has ended, and leaves nothing behind."""

    async def main() -> bool:
        waiters, task = Waiters(), a_task()
        act: Callable[[], None] = (
            waiters.release if what == "released" else functools.partial(end, waiters, task)
        )
        asyncio.get_running_loop().call_later(0.01, act)
        result = await asyncio.wait_for(waiters.wait(task, 60, never), 5)
        assert not waiters._waiting
        return result

    assert asyncio.run(main()) is (what == "ends")


def test_a_client_that_leaves_is_not_waited_for() -> None:
    async def main() -> None:
        waiters = Waiters()
        with pytest.raises(DisconnectedError):
            await waiters.wait(a_task(), 60, gone)

    asyncio.run(main())
