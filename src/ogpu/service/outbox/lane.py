"""One lane of deliveries: a few are in memory, the rest waits in the journal.

Runs in the front, on its event loop.

1. The end of a task is on the disk: ``offer`` holds it for a carrier, unless MAX_HELD are held or
   others are waiting on the disk; then it waits there, too.
2. One of the carriers sends it. What comes of it is recorded, and the delivery let go.
3. The feeder reads from the journal what is due, as far as there is room, and sleeps until the next
   one is. So a receiver that is down for a day costs the memory of MAX_HELD deliveries.
4. A delivery that failed goes to the lane for further attempts (``Lane.again``), whose carriers are
   its own: what is new never waits behind what has failed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..backoff import Backoff
from ..ending import end_all
from ..errors import JournalError
from ..journal import Delivery, DeliveryUpdate, Journal, Lane
from ..logger import logger
from ..metrics import Metrics
from ..task import CallbackState, Task
from .post import Attempt, AttemptOutcome, Sender

GIVE_UP_AFTER_S = 86_400.0
# Attempts after 0.2, 0.5, 1, 1.6 … s; every ten minutes from the twentieth on, 160 in a day.
RETRY_BACKOFF = Backoff(first_s=0.2, limit_s=600.0, factor=1.5)
MAX_HELD = 256
MAX_HELD_BYTES = 16 * 1024 * 1024
_READ_AGAIN_S = 1.0  # after a read that failed
_LONGEST_SLEEP_S = 60.0  # then it looks, whatever it expects: a clock may have been set
# A clock that is set forward must not make the first failure the last.
_LEAST_ATTEMPTS = 10


class LaneCarriers:
    """Carries the deliveries of one lane to one receiver.

    Args:
        lane: which of them.
        sender: the way to the receiver.
        carriers: how many may be under way at once.
        on_failed: called with a delivery that is to be tried again, and when (since 1970).
        on_change: called whenever a delivery has been let go.
    """

    def __init__(
        self,
        lane: Lane,
        sender: Sender,
        journal: Journal,
        metrics: Metrics,
        carriers: int,
        on_failed: Callable[[Lane, float], None],
        on_change: Callable[[], None],
    ) -> None:
        self._lane = lane
        self._sender = sender
        self._journal = journal
        self._metrics = metrics
        self._carriers = carriers
        self._on_failed = on_failed
        self._on_change = on_change
        self._ready: asyncio.Queue[Delivery] = asyncio.Queue()
        self._held: dict[int, int] = {}  # number: bytes
        self._held_bytes = 0
        self._superseded: set[int] = set()  # held, but of no account any more: sent again
        self._let_go: set[int] = set()  # since the read that is under way began
        self._behind = True  # deliveries that are due may be on the disk alone
        self._next_due = 0.0
        self._look = asyncio.Event()
        self._work: list[asyncio.Task[None]] = []

    @property
    def is_busy(self) -> bool:
        """True while something is under way, or could be."""
        return bool(self._held) or self._behind

    def start(self) -> None:
        """Begin to deliver."""
        loop = asyncio.get_running_loop()
        self._work = [loop.create_task(self._carry()) for _ in range(self._carriers)]
        self._work.append(loop.create_task(self._feed()))

    async def stop(self) -> None:
        """Stop delivering; what is under way is delivered again by the next start."""
        await end_all(self._work)

    def offer(self, task: Task, since: float) -> None:
        """Deliver the end of a task, which is on the disk."""
        if self._behind or not self._has_room:
            self._behind = True
            self._look.set()
            return
        self._hold(Delivery(task, self._lane, 0, since))

    def supersede(self, number: int) -> None:
        """Take no account of what comes of an attempt that is under way: it is sent again."""
        if number in self._held:
            self._superseded.add(number)

    def expect(self, due: float) -> None:
        """Look at the disk at that time, for a delivery that will be due."""
        if due < self._next_due:
            self._next_due = due
            self._look.set()

    @property
    def _has_room(self) -> bool:
        return len(self._held) < MAX_HELD and self._held_bytes < MAX_HELD_BYTES

    def _hold(self, delivery: Delivery) -> None:
        size = len(delivery.task.result or b"")
        self._held[delivery.task.number] = size
        self._held_bytes += size
        self._ready.put_nowait(delivery)

    def _release(self, delivery: Delivery) -> None:
        number = delivery.task.number
        self._held_bytes -= self._held.pop(number)
        self._let_go.add(number)
        if self._behind:
            self._look.set()
        self._on_change()

    # --- from the disk

    async def _feed(self) -> None:
        while True:
            try:
                await self._read_due()
            except JournalError:  # which has said why, once
                self._behind = True
                await asyncio.sleep(_READ_AGAIN_S)
            # One row that cannot be understood must not end the lane.
            except Exception:  # noqa: BLE001 - told, and tried again
                logger.exception("Pending callbacks cannot be read: a defect")
                self._behind = True
                await asyncio.sleep(_READ_AGAIN_S)
            else:
                await self._sleep()

    async def _sleep(self) -> None:
        """Sleep until there is something to read, and room for it."""
        while True:
            self._look.clear()
            if not self._behind:
                wait_s = min(self._next_due - time.time(), _LONGEST_SLEEP_S)
            elif len(self._held) <= MAX_HELD // 2 and self._has_room:
                return
            else:
                wait_s = _LONGEST_SLEEP_S
            if wait_s <= 0:
                return
            try:
                await asyncio.wait_for(self._look.wait(), wait_s)
            except asyncio.TimeoutError:
                return

    async def _read_due(self) -> None:
        self._let_go.clear()
        self._behind = False
        self._next_due = float("inf")
        room = max(0, MAX_HELD - len(self._held))
        deliveries, again = await self._journal.due_deliveries(
            self._lane, time.time(), frozenset(self._held), room, MAX_HELD_BYTES
        )
        for delivery in deliveries:
            number = delivery.task.number
            if number not in self._held and number not in self._let_go:
                self._hold(delivery)
        if again is not None:
            if again <= time.time():
                self._behind = True
            else:
                self._next_due = min(self._next_due, again)
        self._on_change()

    # --- to the receiver

    async def _carry(self) -> None:
        while True:
            delivery = await self._ready.get()
            try:
                attempt = await self._sender.post(delivery.task)
            # A defect of ours must not cost a carrier, nor a result.
            except Exception as error:  # noqa: BLE001 - told, and tried again
                logger.exception("[%s] callback: a defect", delivery.task.address)
                attempt = Attempt(AttemptOutcome.FAILED, repr(error))
            self._metrics.on_callback(attempt.outcome.value)
            is_superseded = delivery.task.number in self._superseded
            if not is_superseded:
                self._settle(delivery, attempt)
            self._release(delivery)
            if is_superseded:
                self._superseded.discard(delivery.task.number)
                self.expect(time.time())  # what is to be sent again may be in this lane

    def _settle(self, delivery: Delivery, attempt: Attempt) -> None:
        task, attempts = delivery.task, delivery.attempts + 1
        match attempt.outcome:
            case AttemptOutcome.DELIVERED:
                self._end(delivery, CallbackState.DELIVERED, None)
            case AttemptOutcome.GONE:
                self._end(delivery, CallbackState.GIVEN_UP, attempt.error)
            case AttemptOutcome.REFUSED | AttemptOutcome.FAILED:
                now = time.time()
                last = delivery.since + GIVE_UP_AFTER_S
                if now >= last and attempts >= _LEAST_ATTEMPTS:
                    self._end(delivery, CallbackState.GIVEN_UP, attempt.error)
                    return
                wait_s = max(RETRY_BACKOFF.wait_s(attempts), attempt.retry_after_s)
                due = now + wait_s if now >= last else min(now + wait_s, last)
                update = DeliveryUpdate(
                    CallbackState.PENDING, self._lane.again, attempts, attempt.error, due,
                    delivery.since,
                )  # fmt: skip
                self._journal.record_delivery(task, update)
                self._on_failed(self._lane.again, due)
                if attempts & (attempts - 1) == 0:  # a receiver that is down fails many times
                    logger.warning(
                        "[%s] callback failed (attempt %d): %s; next in %.1f s",
                        task.address,
                        attempts,
                        attempt.error,
                        due - now,
                    )

    def _end(self, delivery: Delivery, state: CallbackState, error: str | None) -> None:
        if state is CallbackState.GIVEN_UP:
            logger.error(
                "[%s] callback given up after %d attempts: %s",
                delivery.task.address,
                delivery.attempts + 1,
                error,
            )
        update = DeliveryUpdate(
            state, self._lane, delivery.attempts + 1, error, None, delivery.since
        )
        self._journal.record_delivery(delivery.task, update)
