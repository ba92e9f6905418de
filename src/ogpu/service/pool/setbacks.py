"""What goes wrong with filling the slots, and when it is enough.

Runs in the front, on its event loop. ``lives.py`` fills the slots; this file decides whether, and
when, it is to try again.

1. A worker did not become ready, or @prepare ended the template. If none ever was ready, the start
   has failed (FirstInitError): a model that cannot be loaded is to be seen at once. Else it costs a
   part of the crash budget, and the slot waits for a while, longer each time
   (``RESTART_BACKOFF``).
2. The budget is used up, no slot is left that can be filled, or a device that was here at the start
   is gone: the pool is broken (PoolBrokenError), and nothing is launched any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Protocol

from ..backoff import RESTART_BACKOFF
from ..config import Settings
from ..devices.devices import Devices
from ..devices.files import LOOK_EVERY_S, DeviceFiles
from ..errors import FirstInitError, PoolBrokenError
from ..logger import logger
from .background import Background
from .budget import CrashBudget
from .slot import Slot, SlotState


class OnBroken(Protocol):
    """Who ends the service."""

    def on_broken(self, error: Exception) -> None:
        """Take notice that the pool cannot be kept alive."""


class Setbacks:
    """Counts failures, and gives up. ``launch`` fills a slot again.

    It owns two facts about the whole pool: whether a worker was ever ready, and whether anything is
    to be launched any more.
    """

    def __init__(
        self,
        slots: list[Slot],
        settings: Settings,
        background: Background,
        launch: Callable[[Slot], None],
        events: OnBroken,
    ) -> None:
        self.first_ready = asyncio.Event()
        self.is_stopping = False
        self._slots = slots
        self._background = background
        self._launch = launch
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._budget = CrashBudget(settings.crash_budget, settings.crash_window)

    def after_failed_start(self, slot: Slot, why: str) -> None:
        """Count a worker that did not become ready, and try again later."""
        if self.is_stopping:
            return
        if not self.first_ready.is_set():
            self.fail_start(why)
            return
        assert slot.started_at is not None
        took = datetime.now(timezone.utc) - slot.started_at
        self.spend_budget(f"slot {slot.index}: {why}", took.total_seconds())
        self.back_off(slot)

    def back_off(self, slot: Slot) -> None:
        """Leave a slot empty for a while."""
        slot.cancel_timers()  # that of an @init which has ended would end the next one
        slot.failures += 1
        slot.move(SlotState.BACKING_OFF)
        if self.is_stopping:
            return
        wait_s = RESTART_BACKOFF.wait_s(slot.failures)
        logger.warning("Slot %d: next try in %.1f s", slot.index, wait_s)
        slot.timer = self._background.call_later(wait_s, self._launch, slot)

    def spend_budget(self, why: str, took_s: float) -> None:
        """Count a failed start, which took so long; give up where it is one too many."""
        if self._budget.spend(self._loop.time(), took_s):
            self.give_up(
                f"{self._budget.failures} starts of workers failed within "
                f"{self._budget.window_s:g} s (OGPU_CRASH_BUDGET, OGPU_CRASH_WINDOW); "
                f"the last, {why}"
            )

    def note_unkillable(self) -> None:
        """Take notice that a slot is lost, for now; give up where it was the last one."""
        if self.is_stopping:
            return
        what = "what is in them does not end, though it was killed"
        if not self.first_ready.is_set():
            self.fail_start(what)
        elif all(slot.state is SlotState.UNKILLABLE for slot in self._slots):
            self.give_up(f"no slot is left to work with: {what}")

    async def watch_devices(self, devices: Devices) -> None:
        """Give up when a device that is here now is gone, by its file or its own words."""
        files = DeviceFiles()
        while not self.is_stopping:
            await asyncio.sleep(LOOK_EVERY_S)
            gone = files.gone()
            what = f"{', '.join(gone)}, which was here at the start, is gone" if gone else None
            what = what or devices.lost
            if what is not None and not self.is_stopping:
                self.give_up(
                    f"{what}; no new worker can cure that: make the container again, and look into "
                    "the host's kernel log"
                )

    def give_up(self, why: str) -> None:
        """Launch nothing any more, and have the service end."""
        self.is_stopping = True
        for slot in self._slots:
            if slot.state is SlotState.BACKING_OFF:
                slot.cancel_timers()
        self._events.on_broken(PoolBrokenError(why))

    def fail_start(self, why: str) -> None:
        """End the service: no worker was ever ready."""
        self.is_stopping = True
        first = why.partition("\n")[0].rstrip(":")  # the rest has been logged
        self._events.on_broken(FirstInitError(f"the first worker did not become ready: {first}"))
