"""The outbox: ends of tasks go to their receivers, with retries, from the journal.

Runs in the front, on the event loop; no worker waits for it.

1. A task's end is on the disk, its callback pending: it is offered to its lane (``lane.py``).
2. Results go to ``{CALLBACK_URL}/{task_address}``, failures to ``{OGPU_FAILURE_CALLBACK_URL}/…``,
   each on carriers of their own, and second attempts on others.
3. An attempt that fails is made again after a jittered back-off, or after ``Retry-After`` where
   that is longer, for a day. Then the delivery is given up, in words.
4. The front stops: what is new still goes out, as long as there is time; the rest is in the
   journal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from ..config import Settings, signing_keys
from ..journal import DeliveryUpdate, Journal, Lane
from ..metrics import Metrics
from ..task import CallbackState, Task
from .client import Client
from .lane import LaneCarriers
from .post import Sender
from .receivers import lanes_of

# How many deliveries may be under way in a lane. New ones have most of it.
_CARRIERS = {
    Lane.RESULTS: 32,
    Lane.RESULTS_AGAIN: 8,
    Lane.FAILURES: 16,
    Lane.FAILURES_AGAIN: 4,
}
_FIRST_LANES = (Lane.RESULTS, Lane.FAILURES)


class Outbox:
    """Delivers callbacks."""

    def __init__(self, settings: Settings, journal: Journal, metrics: Metrics) -> None:
        self._journal = journal
        secret = settings.callback_secret
        keys = [] if secret is None else signing_keys(secret)
        self._changed = asyncio.Event()
        self._senders = {
            lane: Sender(Client(url, settings.callback_timeout), keys)
            for lane, url in lanes_of(settings).items()
        }
        self._lanes: Mapping[Lane, LaneCarriers] = {
            lane: LaneCarriers(
                lane,
                sender,
                journal,
                metrics,
                _CARRIERS[lane],
                self._on_failed,
                self._changed.set,
            )
            for lane, sender in self._senders.items()
        }

    def start(self) -> None:
        """Begin to deliver, what an earlier front has left included."""
        for lane in self._lanes.values():
            lane.start()

    def on_stored(self, task: Task) -> None:
        """Take a task whose end is on the disk (a listener of the journal)."""
        if task.callback.state is CallbackState.PENDING and task.finished_at is not None:
            lane = Lane.first_of(task.state)
            self._lanes[lane].offer(task, task.finished_at.timestamp())

    def send_again(self, task: Task) -> None:
        """Deliver the end of a task once more, whatever came of it until now."""
        now, lane = time.time(), Lane.first_of(task.state)
        update = DeliveryUpdate(CallbackState.PENDING, lane, 0, None, now, now)
        for carriers in self._lanes.values():
            carriers.supersede(task.number)
        self._journal.record_resend(task, update)
        self._lanes[lane].expect(now)

    async def flush(self, timeout_s: float) -> bool:
        """Let go out what is new, or all where the journal forgets; return whether it did."""
        loop = asyncio.get_running_loop()
        limit = loop.time() + timeout_s
        while True:
            self._changed.clear()
            if not self._journal.durable:  # in memory, so at once: it counts what is delivered
                await self._journal.settle()
            if not self._has_work():
                return True
            try:
                await asyncio.wait_for(self._changed.wait(), limit - loop.time())
            except asyncio.TimeoutError:
                return False

    async def stop(self) -> None:
        """Stop delivering."""
        for lane in self._lanes.values():
            await lane.stop()
        for sender in self._senders.values():
            await sender.close()

    def _has_work(self) -> bool:
        if not self._journal.durable:
            return self._journal.undelivered > 0
        return any(self._lanes[lane].is_busy for lane in _FIRST_LANES if lane in self._lanes)

    def _on_failed(self, lane: Lane, due: float) -> None:
        self._lanes[lane].expect(due)
