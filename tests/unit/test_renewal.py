"""Which orders are given again when a template is replaced."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from ogpu.service.pool.background import Background
from ogpu.service.pool.renewal import Renewal
from ogpu.service.pool.slot import Slot, SlotState
from support.journal import on_loop


class Pool:
    """What a Renewal works with: a template that can be made, and workers that are all gone."""

    is_stopping = False

    def __init__(self) -> None:
        self.failures: list[BaseException] = []
        self.again: list[int] = []
        self.made = asyncio.Event()

    async def end_with_template(self) -> None:
        await asyncio.sleep(0)

    def start_template(self) -> None:
        self.made.set()

    def launch_again(self, slot: Slot) -> None:
        self.again.append(slot.index)

    def spend_budget(self, why: str, took_s: float) -> None:
        raise AssertionError(f"{why} ({took_s} s)")


@on_loop
async def test_an_order_is_given_again_only_where_the_template_that_had_it_is_gone() -> None:
    """One that is given after the loss waits for the next template: twice would be two workers."""
    pool = Pool()
    background = Background(pool.failures.append)
    ordered, dying = Slot(0, generation=1), Slot(1, SlotState.STOPPING, generation=1)
    never_ordered = Slot(2)
    whole = cast("Any", pool)
    Renewal([ordered, dying, never_ordered], whole, whole, background, pool).begin()
    dying.move(SlotState.STARTING)  # buried, and ordered again, before the loop turns
    dying.begin_worker()
    await asyncio.wait_for(pool.made.wait(), 5)
    await asyncio.sleep(0)
    assert pool.again == [ordered.index]
    assert not pool.failures
    await background.cancel()
