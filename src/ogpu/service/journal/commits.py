"""Group commit: what changed on the event loop goes to the disk, many tasks at a time.

Runs in the front: the rounds are gathered on the event loop and written by one thread.

1. A task changes: it joins the next round, once, however often it changes before that is written.
2. Somebody waits for it (a 202, a callback): the round is written when the loop's step is over, so
   that all of a step share it. Otherwise within LAZY_S. While one is written the next one grows.
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
from enum import Enum
from typing import Protocol, TypeVar

from ..errors import JournalError
from ..logger import logger
from ..metrics import Metrics
from ..task import Task
from .database import Batch, Database, Written
from .deliveries import DeliveryUpdate
from .rows import row_of

# Nobody waits for such a round, and larger ones cost less: at 50 ms the thread takes half of the
# time for a task that it takes at 10 ms (CPU time a task, echo at concurrency 32).
LAZY_S = 0.05
RETRY_S = 1.0
CLOSE_LIMIT_S = 10.0

Answer = TypeVar("Answer")
Then = Callable[[JournalError | None], None]


class Record:
    """A task in memory, and what of it the database holds."""

    __slots__ = ("has_input", "has_row", "task")

    def __init__(self, task: Task, *, stored: bool) -> None:
        self.task = task
        self.has_row = stored
        self.has_input = stored


class Round:
    """What one commit is to write, and who waits for it."""

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}
        self.deliveries: dict[int, DeliveryUpdate] = {}
        self._waiting: list[Then] = []
        self._ended = False
        self._error: JournalError | None = None

    def __bool__(self) -> bool:
        return bool(self.records or self.deliveries)

    async def wait(self) -> None:
        """Wait until it is on the disk.

        Raises:
            JournalError: it could not be written.
        """
        if not self._ended:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def go_on(_: JournalError | None) -> None:
                if not future.done():  # its request may have gone away
                    future.set_result(None)

            self._waiting.append(go_on)
            await future
        if self._error is not None:
            raise self._error

    def when_ended(self, then: Then) -> None:
        """Have ``then`` called when it is on the disk, or with the reason why it is not."""
        self._waiting.append(then)

    def end(self, error: JournalError | None) -> None:
        """Let those go on who wait; a defect in one of them must not cost the others."""
        self._ended, self._error = True, error
        for then in self._waiting:
            try:
                then(error)
            except Exception:  # noqa: BLE001 - told, and nothing else depends on it
                logger.exception("Who waited for the journal failed: a defect")

    def merged_with(self, later: Round) -> Round:
        """Return a round that writes what both were to write, as it is by then."""
        both = Round()
        both.records = {**self.records, **later.records}
        both.deliveries = {**self.deliveries, **later.deliveries}
        return both

    def split(self) -> tuple[Round, Round]:
        """Return a round with the task of this one that has the least result, and the rest."""
        if len(self.records) < 2:
            return self, Round()
        least = min(self.records.values(), key=lambda record: len(record.task.result or b""))
        one = Round()
        one.deliveries, self.deliveries = self.deliveries, {}
        one.records[least.task.number] = self.records.pop(least.task.number)
        return one, self

    def batch(self) -> Batch:
        """Return the rows of now."""
        batch = Batch()
        for number, record in self.records.items():
            task = record.task
            batch.tasks.append(row_of(task))
            if task.result is not None:
                batch.results.append((number, task.result))
            if not task.is_active:
                if record.has_input:
                    batch.settled.append(number)
            elif not record.has_input and task.input is not None:
                batch.inputs.append((number, task.input))
            record.has_input = task.is_active
        for number, update in self.deliveries.items():
            batch.deliveries.append(update.row(number))
            if update.is_over:
                batch.settled.append(number)
        return batch


class CommitEvents(Protocol):
    """Who wants to know what became of a round."""

    def on_written(self, written: Round) -> None:
        """Take notice that a round is on the disk."""

    def on_not_written(self, failed: Round) -> None:
        """Take out of the round what need not be tried again."""


class _Pace(Enum):
    """What the next round waits for."""

    RESTING = "resting"  # there is none
    LAZY = "lazy"  # it is written within LAZY_S
    SOON = "soon"  # it is written when the loop's step is over
    WRITING = "writing"  # the thread is at work
    TROUBLED = "troubled"  # writing failed, and is tried again within RETRY_S


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
        self._pace = _Pace.RESTING
        self._after = _Pace.LAZY  # the pace once the thread is back
        self._handle: asyncio.Handle | None = None

    def touch(self, record: Record, *, soon: bool) -> None:
        """Have a task's row written again: with this step of the loop, or a moment later."""
        self._next.records[record.task.number] = record
        if soon:
            self._hurry(_Pace.SOON)
        elif self._pace is _Pace.RESTING:  # three times a task: otherwise the round has its time
            self._hurry(_Pace.LAZY)

    def update_delivery(self, number: int, update: DeliveryUpdate) -> None:
        """Have a delivery's state written, of a task whose row is in the database."""
        self._next.deliveries[number] = update
        self._hurry(_Pace.LAZY)

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
            if self._pace is _Pace.TROUBLED and self.trouble is not None:
                raise JournalError(self.trouble)
            self._hurry(_Pace.SOON)
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
        if self._pace is _Pace.TROUBLED:
            raise JournalError(self.trouble or "the journal cannot be written")
        self._hurry(_Pace.SOON)
        await waited.wait()

    async def close(self) -> None:
        """Write what is left, and close the database; give up after a while."""
        try:
            await asyncio.wait_for(self._finish(), CLOSE_LIMIT_S)
        except (JournalError, asyncio.TimeoutError) as error:
            why = str(error) or "the disk hangs"
            logger.critical("Not all could be written to the journal at the end: %s", why)
        self._plan(_Pace.RESTING)
        closing = self._loop.run_in_executor(self._thread, self._database.close)
        await asyncio.wait([closing], timeout=CLOSE_LIMIT_S)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _finish(self) -> None:
        while self._writing or self._next:
            if self._pace is not _Pace.WRITING:
                self._write()
            await (self._writing or self._next).wait()

    def _hurry(self, pace: _Pace) -> None:
        """Have the next round written at that pace, or sooner."""
        match self._pace:
            case _Pace.RESTING | _Pace.LAZY if pace is _Pace.SOON:
                self._plan(pace, self._loop.call_soon(self._write))
            case _Pace.RESTING:
                self._plan(pace, self._loop.call_later(LAZY_S, self._write))
            case _Pace.WRITING if pace is _Pace.SOON:
                self._after = pace
            case _:
                pass

    def _plan(self, pace: _Pace, handle: asyncio.Handle | None = None) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._pace, self._handle = pace, handle

    def _write(self) -> None:
        self._plan(_Pace.WRITING)
        if self._next:
            work = self._database.write
            self._writing, rest = self._next, Round()
            if self.trouble is not None:
                # Many ends may not fit on the disk together; each, when it is there, makes room.
                work = self._database.write_with_room
                self._writing, rest = self._next.split()
            self._next = rest
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
        after, self._after = self._after, _Pace.LAZY
        self._plan(_Pace.RESTING)
        if self._next and (after is _Pace.SOON or self.trouble is not None):
            self._write()  # the thread works while those go on who waited for what was written
        if written is not None:
            self._take(written)
        if self._pace is _Pace.RESTING:
            if self._next:
                self._hurry(_Pace.LAZY)
            elif self.trouble is not None:  # look again whether there is room
                self._plan(_Pace.LAZY, self._loop.call_later(RETRY_S, self._write))

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
        self._plan(_Pace.TROUBLED, self._loop.call_later(RETRY_S, self._write))
        for round_ in (failed, later):
            round_.end(JournalError(trouble))
