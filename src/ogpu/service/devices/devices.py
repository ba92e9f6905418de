"""The devices of the pool: found at start(), dealt to the slots, watched until the end.

Runs in the front. ``Devices.find`` is called before the event loop runs, the rest on it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from ..config import Settings
from ..logger import logger
from .cores import allowed_cores
from .device import Memory, in_words
from .discovery import Sight, choose, look, look_at_files
from .plan import ALLOW_GROWTH, OPENMP, SlotPlan, Wishes, deal
from .watch import DeviceThread


class Devices:
    """What each slot sees, and how full it is.

    Args:
        plans: of each slot, by its index.
        sight: what was found.
        thread: reads the memory; None where there is none to read.
    """

    def __init__(
        self, plans: list[SlotPlan], sight: Sight, thread: DeviceThread | None = None
    ) -> None:
        self.plans = plans
        self._at_start = sight.memory
        self._thread = thread

    @property
    def lost(self) -> str | None:
        """Which device has told that it is gone, in words."""
        return None if self._thread is None else self._thread.lost

    def memory_at_start(self, slot: int) -> Memory | None:
        """Return how full a slot's device was before there was any worker."""
        device = self.plans[slot].device
        return None if device is None else self._at_start.get(device)

    def memory_of(self, slot: int) -> Memory | None:
        """Return how full a slot's device is by the last reading; None: nobody knows."""
        device = self.plans[slot].device
        return None if device is None or self._thread is None else self._thread.memory_of(device)

    def memory(self) -> Iterator[tuple[int, str, Memory]]:
        """Return slot, device and memory, wherever that is known."""
        for slot, plan in enumerate(self.plans):
            memory = self.memory_of(slot)
            if memory is not None:
                yield slot, str(plan.device), memory

    async def read_again(self, limit_s: float) -> bool:
        """Have all devices read now; return False where that takes longer than it may."""
        return self._thread is not None and await self._thread.read_again(limit_s)

    def close(self) -> None:
        """Stop reading."""
        if self._thread is not None:
            self._thread.close()


def begin_look(settings: Settings) -> DeviceThread | None:
    """Begin to look for devices, beside the caller; the process has threads from here on.

    None where OGPU_GPUS says that there are none.
    """
    if settings.gpus == "none":
        return None
    environment = dict(os.environ)  # a copy: the look runs in another thread
    thread = DeviceThread(
        functools.partial(look, environment), functools.partial(look_at_files, environment)
    )
    thread.start()
    return thread


def find_devices(settings: Settings, thread: DeviceThread | None) -> Devices:
    """Wait for the look's end, deal what it found to the slots, and log it.

    Raises:
        SettingsError: OGPU_GPUS names a device that is not there.
    """
    sight = Sight() if thread is None else thread.found()
    chosen = [] if thread is None else choose(sight, settings.gpu_positions, os.environ)
    cores = allowed_cores()
    wishes = Wishes(
        None if settings.workers == "auto" else settings.workers,
        settings.workers_per_gpu,
        hide_gpus=settings.gpus == "none",
    )
    plans = deal(wishes, chosen, cores, os.environ)
    if thread is not None:
        thread.watch(chosen, sight)
    _log(sight, plans, cores, len(chosen))
    return Devices(plans, sight, thread)


def _log(sight: Sight, plans: list[SlotPlan], cores: int, chosen: int) -> None:
    for warning in sight.warnings:
        logger.warning("%s", warning)
    for remark in sight.remarks:
        logger.debug("%s", remark)
    for index, plan in enumerate(plans):
        if plan.device is not None:
            words = in_words(plan.device, sight.memory.get(plan.device))
            logger.info("Worker %d sees %s", index, words)
    if not chosen:
        logger.info("Workers see no GPU")
    if chosen > len(plans):
        logger.warning("%d of %d GPUs have no worker (OGPU_WORKERS)", chosen - len(plans), chosen)
    share = plans[0].environment.get(OPENMP)
    if share is not None:
        logger.info(
            "Numeric libraries get %s of %d core(s) in each worker (%s and others)",
            share,
            cores,
            OPENMP,
        )
    if any(ALLOW_GROWTH in plan.environment for plan in plans):
        logger.info("%s=true is set in workers, since they share GPUs", ALLOW_GROWTH)
