"""Group commit: what changed on the event loop goes to the disk, many tasks at a time.

Runs in the front: the rounds are gathered on the event loop and written by one thread.

1. A task changes: it joins the next round, once, however often it changes before that is written.
2. The round is written at the pace (``Pace``) of who is in the greatest hurry: where somebody
   waits, when the loop's step is over, so that all of a step share it. Where many wait, commits
   begin EVERY_S apart, or as soon as ENOUGH wait again. While one is written the next one grows.
3. A round is written: those who waited go on, and the owner hears of it (``CommitEvents``).
4. A round cannot be written (disk full, file damaged): those who waited get a JournalError. The
   owner withdraws what was never accepted; the rest is tried again, every RETRY_S, until it is
   written.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Protocol, TypeVar

from ..errors import JournalError
from ..logger import logger
from ..metrics import Metrics
from .batch import Written
from .database import Database
from .deliveries import DeliveryUpdate
from .rounds import Record, Round, Then

# Nobody waits for such a round, and larger ones cost less: at 50 ms the thread takes half of the
# time for a task that it takes at 10 ms (CPU time a task, echo at concurrency 32).
LAZY_S = 0.05
# A commit costs as much as ten rows or more. Deliveries at concurrency 32, with a commit after
# each step: 110 µs of the thread's time and 398 µs of the loop's for a task; 6 ms apart: 53 and
# 267. Between 3 and 6 ms apart, and with 24 to 64 for ENOUGH, the rate is the same within the noise
# (4,400 to 5,000 delivered/s); a result arrives 5.0 ms after its 202 with 6 ms, and 3.5 with 4.
EVERY_S = 0.004
CROWD = 4
ENOUGH = 32
RETRY_S = 1.0
CLOSE_LIMIT_S = 10.0

Answer = TypeVar("Answer")


class Pace(IntEnum):
    """What the next round waits for; the greater, the less it can be put off."""

    RESTING = 0  # there is none
    # Nobody waits, and nobody has a promise: of a crash the waiting client hears itself.
    LAZY = 1  # within LAZY_S
    # A task that was answered 202 has begun, and is to count as begun if that kills the front.
    SHORTLY = 2  # when the loop's step is over, or in a crowd with its next commit
    # Somebody waits: for a 202, a callback, an answer.
    SOON = 3  # when the loop's step is over, or a little later in a crowd
    WRITING = 4  # the thread is at work
    TROUBLED = 5  # writing failed, and is tried again within RETRY_S


class CommitEvents(Protocol):
    """Who wants to know what became of a round."""

    def on_written(self, written: Round) -> None:
        """Take notice that a round is on the disk."""

    def on_not_written(self, failed: Round) -> None:
        """Take out of the round what need not be tried again."""


class GroupCommit:
    """Writes rounds, one after the other; owns the database and its thread."""

    def __init__(self, database: Database, metrics: Metrics, events: CommitEvents) -> None:
        self.trouble: str | None = None  # why nothing can be written at present
        self._database = database
        self._metrics = metrics
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ogpu-journal")
        self._next = Round()
        self._writing: Round | None = None
        self._pace = Pace.RESTING
        self._after = Pace.LAZY  # the pace once the thread is back
        self._handle: asyncio.Handle | None = None
        self._hurried = 0  # how often the next round was wanted soon: so many wait for it
        self._earliest_s = 0.0  # of the next commit, on the loop's clock

    def touch(self, record: Record, pace: Pace) -> None:
        """Have a task's row written again, at that pace."""
        self._next.records[record.task.number] = record
        if pace is not Pace.LAZY or self._pace is Pace.RESTING:
            self._hurry(pace)

    def update_delivery(self, number: int, update: DeliveryUpdate) -> None:
        """Have a delivery's state written, of a task whose row is in the database."""
        self._next.deliveries[number] = update
        self._hurry(Pace.LAZY)

    def will_write(self, number: int) -> bool:
        """Return whether a task has changed since the round was begun that was written last."""
        later = self._writing
        return number in self._next.records or (later is not None and number in later.records)

    async def stored(self, number: int) -> None:
        """Wait until a task's present state is on the disk.

        Raises:
            JournalError: it could not be written.
        """
        round_ = self._round_of(number)
        if round_ is not None:
            await round_.wait()

    def when_stored(self, number: int, then: Then) -> None:
        """Call ``then``, later, with None as soon as a task's present state is on the disk.

        Where it cannot be written ``then`` gets the error.
        """
        try:
            round_ = self._round_of(number)
        except JournalError as error:
            self._loop.call_soon(then, error)
            return
        if round_ is None:
            self._loop.call_soon(then, None)
        else:
            round_.when_ended(then)

    def _round_of(self, number: int) -> Round | None:
        """Return the round in which a task is written, and hurry it; None: it is written.

        Raises:
            JournalError: it cannot be written.
        """
        if number in self._next.records:
            if self._pace is Pace.TROUBLED and self.trouble is not None:
                raise JournalError(self.trouble)
            self._hurry(Pace.SOON)
            return self._next
        if self._writing is not None and number in self._writing.records:
            return self._writing
        return None

    async def read(
        self, question: Callable[[Database], Answer], *, must_be_fresh: bool = False
    ) -> Answer:
        """Ask the database, which first is told what has happened until now, if it can be.

        Raises:
            JournalError: it cannot be read, or not be told where that is a must.
        """
        for waited in (self._writing, self._next):
            if not waited:
                continue
            try:
                await self._written(waited)
            except JournalError:
                if must_be_fresh:
                    raise
                break
        try:
            return await self._loop.run_in_executor(self._thread, question, self._database)
        except sqlite3.Error as error:
            logger.error("The journal cannot be used: %s", error)
            raise JournalError(f"the journal cannot be used: {error}") from error

    async def _written(self, waited: Round) -> None:
        if self._pace is Pace.TROUBLED:
            raise JournalError(self.trouble or "the journal cannot be written")
        self._hurry(Pace.SOON)
        await waited.wait()

    async def close(self) -> None:
        """Write what is left, and close the database; give up after a while."""
        try:
            await asyncio.wait_for(self._finish(), CLOSE_LIMIT_S)
        except (JournalError, asyncio.TimeoutError) as error:
            why = str(error) or "the disk hangs"
            logger.critical("Not all could be written to the journal at the end: %s", why)
        self._plan(Pace.RESTING)
        closing = self._loop.run_in_executor(self._thread, self._database.close)
        await asyncio.wait([closing], timeout=CLOSE_LIMIT_S)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _finish(self) -> None:
        while self._writing or self._next:
            if self._pace is not Pace.WRITING:
                self._write()
            await (self._writing or self._next).wait()

    def _hurry(self, pace: Pace) -> None:
        """Have the next round written at that pace, or sooner."""
        self._hurried += pace is Pace.SOON
        if self._pace is Pace.WRITING:
            self._after = max(self._after, pace)
        elif pace > self._pace or (self._hurried == ENOUGH and self._pace is Pace.SOON):
            self._plan_for(pace)

    def _plan_for(self, pace: Pace) -> None:
        if pace is Pace.LAZY:
            wait_s = LAZY_S
        elif pace is Pace.SOON and self._hurried >= ENOUGH:
            wait_s = 0.0
        else:
            wait_s = self._earliest_s - self._loop.time()
        if wait_s > 0:
            self._plan(pace, self._loop.call_later(wait_s, self._write))
        else:
            self._plan(pace, self._loop.call_soon(self._write))

    def _plan(self, pace: Pace, handle: asyncio.Handle | None = None) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._pace, self._handle = pace, handle

    def _write(self) -> None:
        self._plan(Pace.WRITING)
        hurried, self._hurried = self._hurried, 0
        if self._next:
            work = self._database.write
            self._writing, rest = self._next, Round()
            if self.trouble is not None:
                # Many ends may not fit on the disk together; each, when it is there, makes room.
                work = self._database.write_with_room
                self._writing, rest = self._next.split()
            self._next = rest
            if hurried >= CROWD:
                self._earliest_s = self._loop.time() + EVERY_S
            done = self._loop.run_in_executor(self._thread, work, self._writing.batch())
        else:
            done = self._loop.run_in_executor(self._thread, self._database.probe)
        done.add_done_callback(self._on_done)

    def _on_done(self, done: asyncio.Future[Written]) -> None:
        if done.cancelled():  # at the end, when the thread is not waited for any more
            return
        written, self._writing = self._writing, None
        error = done.exception()
        if error is not None:
            self._fail(written or Round(), error)
            return
        self._metrics.on_commit(done.result().took_s)
        # After a failure all is well when the last change that had to wait is on the disk.
        still = self.trouble if self._next else None
        self._note_trouble(done.result().trouble or still)
        after, self._after = self._after, Pace.LAZY
        self._plan(Pace.RESTING)
        if written is not None:
            self._take(written)
        if self.trouble is not None:
            self._go_on_in_trouble()
        elif self._next:
            # Those who waited have gone on, and what they had to write is in it.
            self._plan_for(max(self._pace, after))

    def _go_on_in_trouble(self) -> None:
        if self._next:
            self._write()
        else:  # look again whether there is room
            self._plan(Pace.LAZY, self._loop.call_later(RETRY_S, self._write))

    def _note_trouble(self, trouble: str | None) -> None:
        if trouble is not None and self.trouble is None:
            logger.critical("Nothing is accepted for the present: %s", trouble)
        elif trouble is None and self.trouble is not None:
            logger.warning("The journal takes tasks again")
        self.trouble = trouble

    def _take(self, written: Round) -> None:
        for record in written.records.values():
            record.has_row = True
        self._events.on_written(written)
        written.end(None)

    def _fail(self, failed: Round, error: BaseException) -> None:
        if not isinstance(error, (sqlite3.Error, JournalError)):
            logger.critical("The journal has a defect", exc_info=error)
        trouble = f"the journal cannot be written: {error}"
        self._note_trouble(trouble)
        later, self._next = self._next, failed.merged_with(self._next)
        for record in self._next.records.values():
            # What was never written is written again; what is over is deleted again.
            record.has_input = record.has_row or not record.task.is_active
        self._events.on_not_written(self._next)
        self._plan(Pace.TROUBLED, self._loop.call_later(RETRY_S, self._write))
        for round_ in (failed, later):
            round_.end(JournalError(trouble))
