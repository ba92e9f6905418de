"""Rounds: what goes to the disk together, and who waits for it.

Runs in the front, on the event loop. A round holds records of tasks, not rows: what is written is
what a task is when the round is begun, however often it has changed since it joined.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..errors import JournalError
from ..logger import logger
from ..task import Task
from .batch import Batch
from .deliveries import DeliveryUpdate
from .rows import is_pending, row_of

Then = Callable[[JournalError | None], None]


class Record:
    """A task in memory, and what of it the database holds.

    ``is_promised``: somebody was told, or is about to be, that the task will be run.
    ``is_given``: a worker has the order, and may have begun.
    """

    __slots__ = ("has_input", "has_row", "is_given", "is_promised", "task")

    def __init__(self, task: Task, *, stored: bool) -> None:
        self.task = task
        self.has_row = stored
        self.has_input = stored
        self.is_promised = stored
        self.is_given = False


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
            (batch.pending if is_pending(task) else batch.tasks).append(row_of(task))
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
