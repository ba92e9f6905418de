"""Another template, when the one that is there has died; its workers are gone with it.

Runs in the front, on its event loop.

1. The workers are ended, to be buried as they do (``deaths.py``). Whoever buries them has their
   slots filled again; the orders wait for the next template.
2. The next one is made: at once, but after a pause, and at a cost, where the last one led to no
   worker that was ready.
3. It cannot be made (no memory, no process left): the same, after a pause.
4. The orders that the dead one had not carried out are given again.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from ..backoff import RESTART_BACKOFF
from ..logger import logger
from .background import Background
from .deaths import Deaths
from .launcher import Launcher
from .slot import Slot, SlotState


class RenewalEvents(Protocol):
    """Who fills the slots, and decides when it is enough."""

    @property
    def is_stopping(self) -> bool:
        """True when nothing is to be launched any more."""

    def spend_budget(self, why: str, took_s: float) -> None:
        """Count a failed start, which took so long."""

    def launch_again(self, slot: Slot) -> None:
        """Give an order again that was lost."""


class Renewal:
    """Replaces templates."""

    def __init__(
        self,
        slots: list[Slot],
        launcher: Launcher,
        deaths: Deaths,
        background: Background,
        events: RenewalEvents,
    ) -> None:
        self._slots = slots
        self._background = background
        self._launcher = launcher
        self._deaths = deaths
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._failures = 0  # templates in a row of which no worker became ready
        self._began_s = self._loop.time()  # when the last one was begun

    def note_ready(self) -> None:
        """Take notice that a worker of the present template is ready."""
        self._failures = 0

    def begin(self) -> None:
        """Make another template, and have its workers made."""
        logger.error("The template is gone, and its workers with it; another one is made")
        # Which orders it had not carried out is known now alone: those that are given from here on
        # wait for the next one, and given twice they would make two workers of one slot.
        starting = [s for s in self._slots if s.state is SlotState.STARTING]
        # Slots that were never ordered wait for the first worker to be ready.
        lost_orders = [s for s in starting if s.process is None and s.generation > 0]
        self._background.run(self._replace(lost_orders))

    async def _replace(self, lost_orders: list[Slot]) -> None:
        await self._deaths.end_with_template()
        self._failures += 1
        while not self._events.is_stopping:
            if self._failures > 1:
                why = self._launcher.why_unready or "ended before any worker of it was ready"
                why = f"the template: {why}"
                self._events.spend_budget(why, self._loop.time() - self._began_s)
                await asyncio.sleep(RESTART_BACKOFF.wait_s(self._failures - 1))
            if self._start():
                break
            self._failures += 1
        for slot in lost_orders:
            self._events.launch_again(slot)

    def _start(self) -> bool:
        if self._events.is_stopping:
            return False
        self._began_s = self._loop.time()
        try:
            self._launcher.start_template()
        except OSError as error:
            logger.error("No template can be made: %s", error)
            return False
        return True
