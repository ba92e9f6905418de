"""Waiting for the memory of a GPU: until it is back, and no longer than it may."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator

import pytest

from ogpu.service.devices.device import Device, Memory
from ogpu.service.devices.devices import Devices
from ogpu.service.devices.discovery import Sight
from ogpu.service.devices.plan import SlotPlan
from ogpu.service.devices.watch import DeviceThread
from ogpu.service.logger import logger
from ogpu.service.pool import reclaim
from ogpu.service.pool.reclaim import Reclaim

GIB = 1 << 30
DEVICE = Device("nvidia", "0", source="GPU-0")


class Readings(DeviceThread):
    """Reads one number after the other; None: the device does not answer any more."""

    def __init__(self, used: Iterable[int | None]) -> None:
        self.taken = 0
        self._used: Iterator[int | None] = iter(used)
        self._now: int | None = 0

    def memory_of(self, device: Device) -> Memory | None:
        assert device is DEVICE
        return None if self._now is None else Memory(self._now * GIB, 80 * GIB)

    async def read_again(self, limit_s: float) -> bool:
        self._now = next(self._used)
        self.taken += 1
        return limit_s > 0


def wait_with(
    used: Iterable[int | None], *, is_shared: bool = False, before: int = 1
) -> tuple[int, float]:
    """Return how many readings it took, and how long."""
    thread = Readings(used)
    sight = Sight([DEVICE], is_any_here=True, memory={DEVICE: Memory(before * GIB, 80 * GIB)})
    devices = Devices([SlotPlan(DEVICE, is_shared)], sight, thread)

    async def wait() -> None:
        await Reclaim(devices).memory_back(0)

    began = time.monotonic()
    asyncio.run(wait())
    return thread.taken, time.monotonic() - began


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reclaim, "LIMIT_S", 0.3)
    monkeypatch.setattr(reclaim, "_COMPARE_S", 0.02)


def test_a_device_of_its_own_is_as_empty_as_before() -> None:
    """One reading where it is back already, which is the rule."""
    assert wait_with([1])[0] == 1
    assert wait_with([41, 41, 40, 20, 1, 99])[0] == 5


def test_a_shared_device_does_not_become_emptier_any_more() -> None:
    """However full it is: the other slots have their share of it."""
    assert wait_with([70, 50, 40, 40, 0], is_shared=True)[0] == 4
    assert wait_with([40, 41, 0], is_shared=True)[0] == 2


def test_somebody_else_may_have_taken_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    """The wait has an end, and one warning says so; what is used now is the measure from then."""
    logger.addHandler(caplog.handler)
    try:
        taken, took_s = wait_with(iter(lambda: 41, None))
    finally:
        logger.removeHandler(caplog.handler)
    assert taken > 1
    assert 0.2 < took_s < 2
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "44,023,414,784 bytes are used" in warnings[0]


def test_a_device_that_cannot_be_read_any_more_is_not_waited_for() -> None:
    assert wait_with([41, None, 1])[0] == 2


def test_the_measure_is_taken_anew_with_each_worker() -> None:
    """A neighbour that has grown costs the wait once."""
    thread = Readings([41, 41])
    sight = Sight([DEVICE], is_any_here=True, memory={DEVICE: Memory(GIB, 80 * GIB)})
    devices = Devices([SlotPlan(DEVICE)], sight, thread)

    async def wait() -> None:
        await thread.read_again(1)
        memory = Reclaim(devices)
        memory.note_launch(0)
        await memory.memory_back(0)

    asyncio.run(wait())
    assert thread.taken == 2


def test_without_a_device_there_is_nothing_to_wait_for() -> None:
    async def ask() -> bool:
        return Reclaim(Devices([SlotPlan()], Sight())).can_wait(0)

    assert not asyncio.run(ask())
