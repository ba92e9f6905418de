"""The record of tasks: the one place where a task is accepted, changes its state and is found.

Runs in the front, on the event loop; the disk is ``GroupCommit``'s business. In memory are the
tasks that have not ended and those whose end is not on the disk yet; all others are in the database
alone, however many wait for their callback.

1. ``accept`` makes a task; when ``stored`` returns, its row is on the disk and the 202 may go out.
2. Each transition is told to the listeners at once (waiting requests, events, metrics, log lines).
3. When a task's end is on the disk, the task leaves the memory, and who has to deliver it is told.
4. What is over (terminal, and no callback pending) is forgotten by age, by number and by size.
5. The disk takes nothing: what was never accepted is withdrawn, nothing more is accepted, and the
   rest is kept in memory until it can be written.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Collection
from datetime import datetime, timedelta, timezone

from ..errors import JournalError
from ..logger import logger
from ..metrics import Metrics
from ..task import (
    PENDING_CALLBACK,
    CallbackState,
    Outcome,
    Progress,
    Task,
    TaskState,
    WorkerReference,
)
from .commits import GroupCommit, Pace
from .database import Database
from .deliveries import Delivery, DeliveryUpdate, Lane
from .names import Names
from .pruning import DISK_LIMITS, MEMORY_LIMITS, Pruner
from .rounds import Record, Round, Then
from .rows import task_id

Listener = Callable[[Task], None]
_WITHDRAWN = "the task was withdrawn"


class Journal:
    """The tasks of one front.

    Args:
        database: where they are kept; it belongs to the journal from now on.
        lanes: the lanes that somebody delivers; an end whose lane is not among them tells nobody.
        metrics: where commits are counted.
        task_ttl_s: how long a task that is over is kept.
    """

    def __init__(
        self, database: Database, lanes: Collection[Lane], metrics: Metrics, task_ttl_s: float
    ) -> None:
        self.durable = database.is_durable
        self._id = database.journal_id
        self._last_number = database.last_number
        self._lanes = frozenset(lanes)
        self._commits = GroupCommit(database, metrics, self)
        self._names = Names()
        self._pruner = Pruner(
            self._commits, self._names, DISK_LIMITS if self.durable else MEMORY_LIMITS, task_ttl_s
        )
        self._records: dict[int, Record] = {}
        self._by_address: dict[str, list[Task]] = {}
        # Hashes of names, for whoever asks whether a task of that name may still be undelivered:
        # 70 bytes each, where the names themselves would take 300.
        self._undelivered: Counter[int] = Counter()
        self._settling: dict[int, int] = {}  # the hash, by number, until that is on the disk
        self._on_transition: list[Listener] = []
        self._on_end: list[Listener] = []
        self._on_stored: list[Listener] = []
        self._on_withdrawn: list[Listener] = []

    # --- who wants to know

    def on_transition(self, listener: Listener) -> None:
        """Have ``listener`` called after every transition; it must not raise or block."""
        self._on_transition.append(listener)

    def on_end(self, listener: Listener) -> None:
        """Have ``listener`` called when a task has ended, likewise, and sooner than those."""
        self._on_end.append(listener)

    def on_stored(self, listener: Listener) -> None:
        """Have ``listener`` called when a task, as it is now, has reached the disk."""
        self._on_stored.append(listener)

    def on_withdrawn(self, listener: Listener) -> None:
        """Have ``listener`` called with a task that could not be stored: it was never accepted."""
        self._on_withdrawn.append(listener)

    @property
    def trouble(self) -> str | None:
        """Why nothing can be accepted at present, in words; None: all is well."""
        return self._commits.trouble

    @property
    def undelivered(self) -> int:
        """How many callbacks are pending."""
        return self._undelivered.total()

    # --- the beginning and the end

    async def recover(self) -> list[Task]:
        """Take up what an earlier front has left; return what has not ended, in order.

        Raises:
            JournalError: the database cannot be read.
        """
        tasks = await self._commits.read(Database.unfinished)
        for task in tasks:
            self._remember(Record(task, stored=True))
        await self._commits.read(self._take_names)
        self._pruner.start()
        return tasks

    def _take_names(self, database: Database) -> None:
        """Read all names, in the journal's thread, while nobody asks for one yet."""
        for number, function, address, is_pending in database.names():
            self._names.note(function, address, number)
            if is_pending:
                self._undelivered[hash((function, address))] += 1

    async def settle(self) -> None:
        """Wait until everything that has happened until now is on the disk, or cannot be."""
        with contextlib.suppress(JournalError):  # which says so itself
            await self._commits.read(lambda _: None)

    async def close(self) -> None:
        """Write what is left, and close the database."""
        await self._pruner.stop()
        await self._commits.close()

    # --- acceptance

    def find_active(self, function: str, address: str) -> Task | None:
        """Return the newest task of that name in memory: it may have ended a moment ago."""
        for task in reversed(self._by_address.get(address, ())):
            if task.function == function:
                return task
        return None

    def may_be_undelivered(self, function: str, address: str) -> bool:
        """Return False where no task of that name waits for its callback."""
        return hash((function, address)) in self._undelivered

    def accept(self, function: str, address: str, body: bytes, timeout_s: float | None) -> Task:
        """Make a task, which is queued; it is accepted when ``stored`` has returned.

        Raises:
            JournalError: nothing can be accepted at present.
        """
        if self.trouble is not None:
            raise JournalError(self.trouble)
        self._last_number += 1
        number = self._last_number
        task = Task(number, task_id(self._id, number), function, address, body, timeout_s)
        record = Record(task, stored=False)
        self._remember(record)
        self._commits.touch(record, Pace.LAZY)
        return task

    async def stored(self, task: Task) -> None:
        """Wait until a task's present state is on the disk.

        Raises:
            JournalError: it could not be written.
        """
        self._promise(task)
        await self._commits.stored(task.number)
        if self._was_withdrawn(task):
            raise JournalError(self.trouble or _WITHDRAWN)

    def when_stored(self, task: Task, then: Then) -> None:
        """Have ``then`` called when a task's present state is on the disk (``stored``, as a call).

        It is called once, by the event loop and never before this returns, also where the task is
        on the disk already: with None, or with the JournalError that ``stored`` would raise. It
        must not block. There is no way to withdraw it: whoever does not care any more returns.

        Example:
            journal.when_stored(task, lambda error: answer(202 if error is None else 503))
        """
        if self._was_withdrawn(task):
            error = JournalError(self.trouble or _WITHDRAWN)
            asyncio.get_running_loop().call_soon(then, error)
        else:
            self._promise(task)
            self._commits.when_stored(task.number, then)

    def _promise(self, task: Task) -> None:
        record = self._records.get(task.number)
        if record is not None:
            record.is_promised = True

    def _was_withdrawn(self, task: Task) -> bool:
        return task.number not in self._records and not task.state.is_terminal

    # --- transitions

    def note_given(self, task: Task, *, is_given: bool) -> None:
        """Take notice that a worker may begin a queued task at any moment, or cannot any more."""
        self._records[task.number].is_given = is_given

    def start(self, task: Task, worker: WorkerReference, at: datetime) -> None:
        """Record that a worker is given the task; its clock runs from ``at``."""
        task.advance(TaskState.RUNNING)
        task.started_at = at
        task.worker = worker
        task.deadline = None if task.timeout_s is None else at + timedelta(seconds=task.timeout_s)
        self._record(task)

    def requeue(self, task: Task, *, is_loss: bool) -> None:
        """Record that a task is to run again: its worker or its front was lost, or had to stop."""
        task.advance(TaskState.QUEUED)
        task.attempt += 1
        task.losses += is_loss
        task.started_at = task.worker = task.deadline = task.progress = None
        self.note_given(task, is_given=False)
        self._record(task)

    def finish(self, task: Task, outcome: Outcome) -> None:
        """Record how the task ended. The first end wins: later news is dropped, and logged."""
        if task.state.is_terminal:
            logger.warning(
                "[%s] `%s` had ended as %s already; dropped: %s",
                task.address,
                task.function,
                task.state.value,
                outcome.state.value,
            )
            return
        task.advance(outcome.state)
        task.finished_at = datetime.now(timezone.utc)
        task.result = outcome.result
        task.error = outcome.error
        task.output = outcome.output
        if Lane.first_of(task.state) in self._lanes:
            task.callback = PENDING_CALLBACK
            self._undelivered[hash(task.key)] += 1
        else:
            task.input = None  # only a task that is active is compared with, or run again
        self._record(task)

    def note_progress(self, task: Task, progress: Progress) -> None:
        """Keep what a running task says of itself; it is written with its next transition."""
        if task.state is TaskState.RUNNING:
            task.progress = progress

    def _record(self, task: Task) -> None:
        record = self._records[task.number]
        if task.callback.state is CallbackState.PENDING:
            pace = Pace.SOON
        elif record.is_promised and task.state is TaskState.RUNNING:
            pace = Pace.SHORTLY
        else:
            pace = Pace.LAZY
        self._commits.touch(record, pace)
        if task.state.is_terminal:
            _tell(self._on_end, task)
        _tell(self._on_transition, task)

    # --- delivery

    def record_delivery(self, task: Task, update: DeliveryUpdate) -> None:
        """Record what has become of the delivery of a task's end, which is on the disk."""
        name = hash(task.key)
        if update.is_over and self._undelivered[name]:  # (a Counter does not keep what it lacks)
            self._settling[task.number] = name
            self._pruner.note_end()
        self._commits.update_delivery(task.number, update)

    def record_resend(self, task: Task, update: DeliveryUpdate) -> None:
        """Record that the end of a task, as it was found, is to be delivered once more."""
        is_settling = self._settling.pop(task.number, None) is not None
        if not is_settling and task.callback.state is not CallbackState.PENDING:
            self._undelivered[hash(task.key)] += 1
        self._commits.update_delivery(task.number, update)

    def can_deliver(self, task: Task) -> bool:
        """Return whether somebody is to be told how the task ended."""
        return Lane.first_of(task.state) in self._lanes

    async def due_deliveries(
        self, lane: Lane, now: float, held: frozenset[int], limit: int, most_bytes: int
    ) -> tuple[list[Delivery], float | None]:
        """Return deliveries whose time has come, and when to look again (see ``Database``)."""
        # Told late what was delivered, the database would have it delivered again and again.
        return await self._commits.read(
            lambda database: database.due_deliveries(lane, now, held, limit, most_bytes),
            must_be_fresh=True,
        )

    # --- reading

    async def find(self, address: str, function: str | None = None) -> list[Task]:
        """Return the newest task of each function that knows this address, or of one function.

        An end that it shows is on the disk, so that nobody will see another one.

        Raises:
            JournalError: the journal cannot be read or written.
        """
        known = {  # the newest of each function, which is the last
            task.function: task
            for task in self._by_address.get(address, ())
            if function in (None, task.function)
        }
        numbers = [
            number
            for name, number in self._names.numbers(address, function).items()
            if name not in known
        ]
        found = []
        if numbers:
            stored = await self._commits.read(lambda database: database.find(numbers))
            found = [task for task in stored if task.address == address]
        for task in known.values():
            if task.state.is_terminal:
                await self.stored(task)
        return found + [task for task in known.values() if not self._was_withdrawn(task)]

    async def page(
        self, state: TaskState | None, below: int | None, limit: int, most_bytes: int
    ) -> tuple[list[Task], bool]:
        """Return tasks below a number, newest first, and whether there are more (``Database``)."""
        return await self._commits.read(
            lambda database: database.page(state, below, limit, most_bytes)
        )

    async def inputs(self, numbers: Collection[int], most_bytes: int) -> dict[int, bytes]:
        """Return inputs of tasks, by number: as many as are in so many bytes, and one more."""
        return await self._commits.read(lambda database: database.inputs(numbers, most_bytes))

    def unfinished(self) -> list[Task]:
        """Return the tasks in memory that have not ended."""
        return [r.task for r in self._records.values() if not r.task.state.is_terminal]

    # --- what becomes of commits (CommitEvents)

    def on_written(self, written: Round) -> None:
        for number, record in written.records.items():
            task = record.task
            self._names.note(task.function, task.address, number)
            if self._commits.will_write(number):
                continue  # it has changed since, and what was written is history
            if task.state.is_terminal:
                self._forget(task)
                self._pruner.note_end()
            _tell(self._on_stored, task)
        for number, update in written.deliveries.items():
            if update.is_over and number in self._settling:
                name = self._settling.pop(number)
                self._undelivered[name] -= 1
                if self._undelivered[name] <= 0:
                    del self._undelivered[name]

    def on_not_written(self, failed: Round) -> None:
        for record in list(failed.records.values()):
            # What runs already goes on, and is written when that can be done.
            waits = record.task.state is TaskState.QUEUED and not record.is_given
            if waits and not record.has_row:
                del failed.records[record.task.number]
                self._forget(record.task)
                _tell(self._on_withdrawn, record.task)

    def _remember(self, record: Record) -> None:
        self._records[record.task.number] = record
        self._by_address.setdefault(record.task.address, []).append(record.task)

    def _forget(self, task: Task) -> None:
        del self._records[task.number]
        tasks = self._by_address[task.address]
        tasks.remove(task)
        if not tasks:
            del self._by_address[task.address]


def _tell(listeners: list[Listener], task: Task) -> None:
    """Tell listeners; a defect in one of them must cost neither the others nor the journal."""
    for listener in listeners:
        try:
            listener(task)
        except Exception:  # noqa: BLE001 - told, and nothing else depends on it
            logger.exception("A listener of the journal failed: a defect")
