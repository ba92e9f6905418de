"""The dispatcher: gives queued tasks to ready workers, one or a batch, and keeps their clocks.

Runs in the front, on its event loop; the supervisor owns it, and tells it what workers answer.

1. A slot is ready, and there is a task, or a batch, to run (``batches.py``): the clock starts, the
   worker gets its orders, and that they run is recorded.
2. A task that an earlier front may have been killed by is recorded as running first, and given out
   when that is on the disk: otherwise one that kills the front at once would do so for ever, since
   no start would know that it ran.
3. Where tasks are short, a busy worker has the next orders as well (``ahead.py``), and goes on to
   them by itself. What it says of that is heard before it is killed for the task before.
4. The deadline passes, or somebody cancels: the worker is killed, and the task's end is recorded
   with what it was doing then. What it still answers is dropped. Where there is a grace, the
   handler is asked to stop first. The deadline is that of the whole batch; of a batch of which one
   task is cancelled, the others run again, unless they are past it.
5. A task has waited in the queue for too long: it expires.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections.abc import Callable
from datetime import datetime, timezone

from .. import wire
from ..config import Settings
from ..devices.cores import allowed_cores
from ..errors import JournalError
from ..handler import Handler
from ..journal import Journal
from ..metrics import Metrics
from ..task import Outcome, Task
from .ahead import Ahead
from .awake import Awake
from .background import Background
from .batches import Batches
from .estimate import Estimate
from .evidence import cancelled, cancelled_in_queue, expired, input_lost, timed_out
from .lives import Lives
from .orders import Orders
from .process import WorkerProcess
from .queue import TaskQueue
from .slot import ExitReason, Slot, SlotState

# A worker that has taken an order says so within microseconds, unless it is stopped.
_TAKEN_S = 0.001
# Of a task, what it printed last, and what its threads were doing. None: it is to run again.
OutcomeOfKilled = Callable[[Task, str | None, str | None], Outcome | None]


class Dispatcher:
    """Owns the queue. ``on_freed`` is called when there is a task less, by no answer."""

    def __init__(
        self,
        lives: Lives,
        journal: Journal,
        background: Background,
        meters: tuple[Metrics, Estimate],
        rules: tuple[Settings, dict[str, Handler]],
        on_freed: Callable[[], None],
    ) -> None:
        settings, handlers = rules
        self._is_closed = False  # nothing more is given out
        self._lives = lives
        self._journal = journal
        self._background = background
        self._metrics, self._estimate = meters
        self._queue_timeout_s = settings.queue_timeout
        self._graces_s = {
            name: settings.kill_grace if handler.grace_s is None else handler.grace_s
            for name, handler in handlers.items()
        }
        self._on_freed = on_freed
        self.queue = TaskQueue(journal, background, settings.queue_timeout, self)
        self._batches = Batches(self.queue, handlers, background, self.dispatch, settings)
        self._orders = Orders(self._graces_s)
        self.ahead = Ahead(
            lives.slots,
            (self.queue, self._batches, self._orders),
            journal,
            self._estimate,
            (settings, handlers, self._graces_s),
        )
        self._awake = Awake(lives.slots, allowed_cores())
        self._unwanted: set[Task] = set()  # being cancelled: several of a batch cost one worker
        journal.on_stored(self.queue.on_stored)
        journal.on_withdrawn(self._on_withdrawn)

    # --- into the queue, and out of it

    def submit(self, task: Task) -> None:
        """Queue a new task; it runs when its turn comes."""
        self._awake.note_task()
        self.queue.append(task)
        self.dispatch()

    def resubmit(self, task: Task, waited_s: float) -> None:
        """Queue a task of an earlier front."""
        self._orders.note_recovered(task)
        self.queue.append(task, waited_s=waited_s)
        self.dispatch()

    def submit_first(self, tasks: list[Task]) -> None:
        """Queue tasks again, first in line, in their order."""
        for task in reversed(tasks):
            self.queue.append_first(task)
        self.dispatch()

    def submit_alone(self, tasks: list[Task]) -> None:
        """Queue tasks again, each to be run alone: their batch has killed its worker."""
        self._batches.separate(tasks)
        self.submit_first(tasks)

    async def cancel(self, task: Task) -> None:
        """End a task that has not ended: take it out of the queue, or kill its worker.

        Where its worker is being killed already, wait until that is recorded: for its deadline, so
        that it has ended; or for another task of the same batch, and then this one ends with it.
        """
        self._unwanted.add(task)
        try:
            while not task.state.is_terminal:
                if self._is_being_taken(task):
                    await asyncio.sleep(_TAKEN_S)
                    continue
                slot = self.slot_of(task)
                if slot is None:
                    self.queue.remove(task)
                    self.finish(task, cancelled_in_queue(task))
                    self._on_freed()
                    return
                process = slot.process
                assert process is not None
                if slot.state is SlotState.BUSY:
                    if self._has_gone_on(slot, task):
                        continue
                    outcome = functools.partial(self._outcome_of_cancelled, slot)
                    self._cut_short(slot, outcome, ExitReason.CANCELLED)
                elif process.settled.is_set():  # its worker ends for another reason
                    self._finish_one(slot, process, task)
                    return
                await process.settled.wait()
        finally:
            self._unwanted.discard(task)

    def on_expired(self, task: Task) -> None:
        assert self._queue_timeout_s is not None
        self.finish(task, expired(task, self._queue_timeout_s))
        self._on_freed()

    def on_input_lost(self, task: Task) -> None:
        self.finish(task, input_lost(task))
        self._on_freed()

    def on_loaded(self) -> None:
        self.dispatch()

    def _on_withdrawn(self, task: Task) -> None:
        self.queue.remove(task)
        self._on_freed()

    # --- giving out work

    def close(self, *, is_kept: bool) -> None:
        """Prepare for the end; ``is_kept``: what waits is run by the next start, and not now."""
        self._is_closed = is_kept
        if is_kept:
            self.ahead.take_back_all()
        self._batches.close_windows()
        self.dispatch()

    def dispatch(self) -> None:
        """Give tasks to the slots that are ready."""
        if self._is_closed:
            return
        self.ahead.take_back_overdue()
        for slot in self._lives.slots:
            if slot.state is SlotState.READY:
                if not self.queue:
                    self.ahead.take_back_all()
                tasks = self._batches.take()
                if not tasks:
                    return
                self._give(slot, tasks)
        if self.queue:
            self.ahead.fill()

    def _give(self, slot: Slot, tasks: list[Task]) -> None:
        process = slot.process
        assert process is not None
        slot.move(SlotState.BUSY)
        started_at = datetime.now(timezone.utc)
        deadline_s = self._start_clock(slot, process, tasks)
        deadline_at = None
        if deadline_s is not None:
            deadline_at = started_at.timestamp() + deadline_s - slot.began_s
        orders = []
        may_spin = self._awake.has_core()
        for more, task in zip(range(len(tasks) - 1, -1, -1), tasks, strict=True):
            order = self._orders.with_deadline(task, deadline_at, deadline_s, more)
            order[0].may_spin = may_spin
            orders.append(order)
            slot.tasks[order[0].run] = task
        if self._batches.has(tasks[0].function):
            self._metrics.on_batch(tasks[0].function, len(tasks))
        if any(map(self._orders.must_be_stored, tasks)):
            self._orders.forget_recovered(tasks)
            process.orders_unread = True  # until they are sent
            self._background.run(self._send_when_stored(slot, process, orders, tasks))
        else:
            # The clocks were read before the worker can begin; what is recorded may come after.
            process.send(orders)
            if not self.waiting:
                self._awake.expect_answer(tasks[0].function)
        for task in tasks:
            self._journal.start(task, process.reference, started_at)

    def _start_clock(self, slot: Slot, process: WorkerProcess, tasks: list[Task]) -> float | None:
        """Let the time of tasks, and what is printed, be theirs; return their deadline."""
        process.output.begin_tasks(tuple(tasks))
        slot.was_asked = False
        slot.given = len(tasks)
        slot.began_s = time.monotonic()
        timeout_s = tasks[0].timeout_s
        if timeout_s is None:
            return None
        deadline_s = slot.deadline_s = slot.began_s + timeout_s
        if slot.deadline_timer is None or slot.rings_s > deadline_s:
            self._set_timer(slot, timeout_s)
        return deadline_s

    def begin_ahead(self, slot: Slot, run: int) -> None:
        """Let the task of an order ahead run: its worker has taken it."""
        process = slot.process
        assert process is not None
        task = slot.tasks[run] = self.ahead.begin(slot, run)
        process.note_orders(1)
        self._start_clock(slot, process, [task])
        self._journal.start(task, process.reference, datetime.now(timezone.utc))

    async def _send_when_stored(
        self,
        slot: Slot,
        process: WorkerProcess,
        orders: list[tuple[wire.Run, bytes]],
        tasks: list[Task],
    ) -> None:
        for task in tasks:
            # A disk that takes nothing must not stop what was accepted: it says so itself.
            with contextlib.suppress(JournalError):
                await self._journal.stored(task)
        # They may have been cut short meanwhile. What was cancelled took its batch with it.
        if [order.run for order, _ in orders] == list(slot.tasks):
            process.orders_unread = False
            process.send(orders)

    # --- taking them back

    def slot_of(self, task: Task) -> Slot | None:
        """Return the slot that runs a task."""
        return next((slot for slot in self._lives.slots if task in slot.tasks.values()), None)

    @property
    def waiting(self) -> int:
        """How many tasks wait for a worker."""
        return len(self.queue) + self.ahead.waiting

    def return_ahead(self, slot: Slot) -> None:
        """Queue again what a worker that is gone has not begun."""
        if slot.ahead:
            self.ahead.return_all(slot)
            self._background.call_later(0, self.dispatch)  # after what is to be first in line

    def _is_being_taken(self, task: Task) -> bool:
        """Have a task that waits in the queue again; True: its worker has taken it just now."""
        holder = self.ahead.holder_of(task)
        if holder is None or self.ahead.take_back(holder):
            return False
        if holder.process is not None:
            holder.process.hear()
        return self.ahead.holder_of(task) is not None

    def _has_gone_on(self, slot: Slot, task: Task) -> bool:
        """Take orders ahead back; tell whether the worker has ended its task before that."""
        if self.ahead.take_back(slot):
            return False
        assert slot.process is not None
        slot.process.hear()
        return task not in slot.tasks.values()

    def take_back(self, slot: Slot, run: int) -> Task:
        """Free a slot of a task that is about to end."""
        task = slot.tasks.pop(run)
        if not slot.tasks:
            self._stop_clock(slot)
        return task

    def take_back_all(self, slot: Slot) -> list[Task]:
        """Free a slot of its tasks, which are about to end or to be queued again."""
        tasks, slot.tasks = list(slot.tasks.values()), {}
        self._stop_clock(slot)
        return tasks

    @staticmethod
    def _stop_clock(slot: Slot) -> None:
        slot.deadline_s = math.inf

    def finish(self, task: Task, outcome: Outcome, given: int = 1) -> None:
        """Record how a task ended; ``given``: how many ran together."""
        self._journal.finish(task, outcome)
        self._batches.forget(task)
        if task.started_at is not None and task.finished_at is not None:
            took_s = (task.finished_at - task.started_at).total_seconds()
            self._estimate.note_run(task.function, took_s / given)
            self._awake.note_run(task.function, took_s)
        if not self.queue:
            self._awake.expect_task()

    # --- deadlines and cancels

    def _set_timer(self, slot: Slot, delay_s: float) -> None:
        if slot.deadline_timer is not None:
            slot.deadline_timer.cancel()
        slot.rings_s = time.monotonic() + delay_s
        slot.deadline_timer = self._background.call_later(delay_s, self._on_deadline, slot)

    def _on_deadline(self, slot: Slot) -> None:
        slot.deadline_timer = None
        if not slot.tasks or slot.deadline_s == math.inf:
            return
        # It was set for an earlier task; or the loop's clock, which stands still during a step, has
        # made it early.
        remaining_s = slot.deadline_s - time.monotonic()
        if remaining_s > 0:
            self._set_timer(slot, remaining_s)
            return
        process = slot.process
        assert process is not None
        task = next(iter(slot.tasks.values()))
        if self._has_gone_on(slot, task):
            self._on_deadline(slot)
            return
        grace_s = 0.0 if slot.was_asked else self._graces_s[task.function]
        if grace_s > 0:
            slot.was_asked = True
            slot.deadline_s += grace_s
            process.ask()
            self._set_timer(slot, grace_s)
        else:
            self._cut_short(slot, timed_out, ExitReason.TIMED_OUT)

    def _outcome_of_cancelled(
        self, slot: Slot, task: Task, output: str | None, stack: str | None
    ) -> Outcome | None:
        """Return how a task ends of whose batch one or several were cancelled."""
        if task in self._unwanted:
            return cancelled(task, output, stack)
        return timed_out(task, output, stack) if slot.was_asked else None

    def _finish_one(self, slot: Slot, process: WorkerProcess, task: Task) -> None:
        """Cancel a task whose worker is dying; what becomes of its batch, its death will tell."""
        process.output.drain()
        (run,) = (run for run, one in slot.tasks.items() if one is task)
        self.take_back(slot, run)
        self.finish(task, cancelled(task, process.output.tail(), None), slot.given)
        self._on_freed()

    def _cut_short(self, slot: Slot, outcome: OutcomeOfKilled, reason: ExitReason) -> None:
        """Kill the worker of running tasks, and record their ends with what it was doing."""
        slot.cancel_timers()
        record = functools.partial(self._finish_cut_short, slot, outcome)
        self._lives.end_worker(slot, reason, then=record)

    def _finish_cut_short(self, slot: Slot, outcome: OutcomeOfKilled, stack: str | None) -> None:
        process = slot.process
        assert process is not None
        process.output.drain()
        again = []
        for task in self.take_back_all(slot):
            end = outcome(task, process.output.tail(), stack)
            if end is None:
                self._journal.requeue(task, is_loss=False)
                again.append(task)
            else:
                self.finish(task, end, slot.given)
        self.submit_first(again)
        self._on_freed()
