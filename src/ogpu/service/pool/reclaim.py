"""The memory of a dead worker's GPU: the next worker's @init begins when it is back.

Runs in the front, on its event loop. A worker that is reaped has closed its GPU, but a driver may
still be giving the memory back, and a model that fills the GPU does not fit in meanwhile.

1. When a worker is launched it is noted how full its device is; for the first one, how full it was
   before there was any worker.
2. It is gone, and its slot is to be filled again: the device is read until it is no fuller than
   then. Where several slots share it, others load and free beside it: until it has not become
   emptier between two readings.
3. It is not so after LIMIT_S, or the device does not answer: the next worker is launched all the
   same, and the log says so. Somebody else's process may have taken the memory.
4. Where memory cannot be read, or there is no device, nothing waits.
"""

from __future__ import annotations

import asyncio

from ..devices.device import Memory
from ..devices.devices import Devices
from ..logger import logger

LIMIT_S = 5.0
_LOOK_AGAIN_S = 0.02
# Of a shared device, whose readings are compared with each other.
_COMPARE_S = 0.1
# What a driver keeps for itself after the first context on a device is no worker's.
_SLACK_BYTES = 64 << 20


class Reclaim:
    """Knows how full each slot's device was before its worker."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._loop = asyncio.get_running_loop()
        slots = range(len(devices.plans))
        self._before = {slot: devices.memory_at_start(slot) for slot in slots}

    def note_launch(self, slot: int) -> None:
        """Note how full the device is now: another worker is about to use it."""
        self._before[slot] = self._devices.memory_of(slot) or self._before[slot]

    def can_wait(self, slot: int) -> bool:
        """Tell whether there is anything to wait for."""
        return self._devices.memory_of(slot) is not None

    async def memory_back(self, slot: int) -> None:
        """Wait until the memory of a worker that is gone is free again, for LIMIT_S at most."""
        began_s = self._loop.time()
        limit_s = began_s + LIMIT_S
        last: Memory | None = None
        while await self._devices.read_again(limit_s - self._loop.time()):
            now = self._devices.memory_of(slot)
            if now is None or self._is_back(slot, last, now):
                self._log(slot, last, self._loop.time() - began_s)
                return
            last = now
            pause_s = _COMPARE_S if self._devices.plans[slot].is_shared else _LOOK_AGAIN_S
            if self._loop.time() + pause_s > limit_s:
                break
            await asyncio.sleep(pause_s)
        logger.warning(
            "The memory of worker %d's device is not back %.0f s after its end%s; the next worker "
            "is launched all the same",
            slot,
            LIMIT_S,
            "" if last is None else f" ({last.used_bytes:,} bytes are used)",
        )

    def _is_back(self, slot: int, last: Memory | None, now: Memory) -> bool:
        if self._devices.plans[slot].is_shared:
            return last is not None and now.used_bytes >= last.used_bytes
        before = self._before[slot]
        return before is None or now.used_bytes <= before.used_bytes + _SLACK_BYTES

    def _log(self, slot: int, last: Memory | None, took_s: float) -> None:
        if last is not None and not self._devices.plans[slot].is_shared:
            logger.info("The memory of worker %d's device was back after %.2f s", slot, took_s)
