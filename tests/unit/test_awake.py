"""The loop waits awake for what came soon the last time, for a moment, where a core is to spare."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable

import pytest

from ogpu.service.pool.awake import AWAKE_S, Awake
from ogpu.service.pool.slot import Slot, SlotState

SHORT_S, LONG_S = AWAKE_S / 4, AWAKE_S * 4
LOOKS = 5  # without sleeping, while the moment lasts


class Watched(selectors.DefaultSelector):
    """A selector that counts how often it was asked to look, without sleeping."""

    looks = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.looks += timeout == 0
        return super().select(timeout)


class Clock:
    """A clock that goes on a little whenever it is read."""

    def __init__(self) -> None:
        self.now_s = 1.0

    def __call__(self) -> float:
        self.now_s += AWAKE_S / LOOKS
        return self.now_s


Say = Callable[[Awake, Clock], None]


def looks(say: Say, cores: int = 2, busy: int = 1) -> int:
    """Return how often a loop looked for events because of what was said, until it slept again."""
    selector = Watched()
    loop = asyncio.SelectorEventLoop(selector)
    slots = [Slot(index, SlotState.BUSY if index < busy else SlotState.READY) for index in range(3)]

    async def main(*, is_silent: bool) -> int:
        clock = Clock()
        awake, over = Awake(slots, cores, clock), loop.create_future()
        if not is_silent:
            say(awake, clock)
        before = selector.looks
        loop.call_later(0.02, over.set_result, None)
        await over
        return selector.looks - before

    try:
        own = loop.run_until_complete(main(is_silent=True))
        return loop.run_until_complete(main(is_silent=False)) - own
    finally:
        loop.close()


def an_answer(*took_s: float) -> Say:
    """Expect the answer of a function whose last runs took so long."""

    def say(awake: Awake, clock: Clock) -> None:
        del clock
        for one_s in took_s:
            awake.note_run("f", one_s)
        awake.expect_answer("f")

    return say


def a_task(gap_s: float) -> Say:
    """Expect a task, after one that came so long after the one before."""

    def say(awake: Awake, clock: Clock) -> None:
        awake.expect_task()
        clock.now_s += gap_s
        awake.note_task()
        awake.expect_task()

    return say


def another_function(awake: Awake, clock: Clock) -> None:
    an_answer(SHORT_S)(awake, clock)
    awake.expect_answer("g")


@pytest.mark.parametrize(
    ("say", "busy"),
    [
        (an_answer(SHORT_S), 1),
        (an_answer(LONG_S, SHORT_S), 1),
        (a_task(0), 0),
    ],
)
def test_what_came_soon_the_last_time_is_waited_for_awake(say: Say, busy: int) -> None:
    """The loop turns without sleeping, for AWAKE_S, and then sleeps."""
    assert LOOKS - 2 <= looks(say, busy=busy) <= LOOKS + 1


@pytest.mark.parametrize(
    ("say", "cores", "busy"),
    [
        (an_answer(), 2, 1),  # nothing is known
        (an_answer(LONG_S), 2, 1),
        (an_answer(SHORT_S, LONG_S), 2, 1),
        (an_answer(SHORT_S), 2, 2),  # a worker on each core
        (an_answer(SHORT_S), 1, 1),
        (a_task(LONG_S), 2, 0),
        (a_task(0), 1, 0),  # the core may be the client's
        (a_task(0), 2, 1),  # a worker is busy: something else comes first
    ],
)
def test_otherwise_the_loop_sleeps(say: Say, cores: int, busy: int) -> None:
    """Unknown, long, no core to spare: nothing is done at all."""
    assert looks(say, cores, busy) <= 0


def test_what_is_not_worth_it_ends_the_waiting() -> None:
    """A task of another function, given out while the loop is awake, lets it sleep."""
    assert looks(another_function) <= 1


@pytest.mark.parametrize(("busy", "may"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_worker_may_wait_awake_where_a_core_is_to_spare(*, busy: int, may: bool) -> None:
    """It is how many are busy that counts, not how many there are."""
    slots = [Slot(index, SlotState.BUSY if index < busy else SlotState.READY) for index in range(3)]

    async def main() -> bool:
        return Awake(slots, 2).has_core()

    assert asyncio.run(main()) is may
