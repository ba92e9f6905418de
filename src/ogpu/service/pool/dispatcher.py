"""The dispatcher: gives queued tasks to ready workers, and keeps their clocks.

Runs in the front, on its event loop; the supervisor owns it, and tells it what workers answer.

1. A slot is ready, a task at the head of the queue: its clock starts, the worker gets the order,
   and that it runs is recorded. One task a worker at a time.
2. A task that an earlier front may have been killed by is recorded as running first, and given out
   when that is on the disk: otherwise one that kills the front at once would do so for ever, since
   no start would know that it ran.
3. The deadline passes, or somebody cancels: the worker is killed, and the task's end is recorded
   with what it was doing then. What it still answers is dropped. Where there is a grace, the
   handler is asked to stop first.
4. A task has waited in the queue for too long: it expires.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from datetime import datetime, timezone

from .. import wire
from ..errors import JournalError
from ..journal import Journal
from ..task import Outcome, Task
from .background import Background
from .estimate import Estimate
from .evidence import cancelled, cancelled_in_queue, expired, input_lost, timed_out
from .lives import Lives
from .process import WorkerProcess
from .queue import TaskQueue
from .slot import ExitReason, Slot, SlotState

# Of a task, what it printed last, and what its threads were doing.
OutcomeOfKilled = Callable[[Task, str | None, str | None], Outcome]


class Dispatcher:
    """Owns the queue. ``on_freed`` is called when there is a task less, by no answer.

    ``limits_s``: how long a task may wait, and the grace of each function after its deadline.
    """

    def __init__(
        self,
        lives: Lives,
        journal: Journal,
        background: Background,
        estimate: Estimate,
        limits_s: tuple[float | None, dict[str, float]],
        on_freed: Callable[[], None],
    ) -> None:
        self.is_closed = False  # nothing more is given out
        self._lives = lives
        self._journal = journal
        self._background = background
        self._estimate = estimate
        self._queue_timeout_s, self._graces_s = limits_s
        self._on_freed = on_freed
        self.queue = TaskQueue(journal, background, self._queue_timeout_s, self)
        self._runs = 0
        self._to_be_stored: set[int] = set()  # numbers of tasks of an earlier front
        journal.on_stored(self.queue.on_stored)
        journal.on_withdrawn(self._on_withdrawn)

    # --- into the queue, and out of it

    def submit(self, task: Task) -> None:
        """Queue a new task; it runs when its turn comes."""
        self.queue.append(task)
        self.dispatch()

    def resubmit(self, task: Task, waited_s: float) -> None:
        """Queue a task of an earlier front."""
        self._to_be_stored.add(task.number)
        self.queue.append(task, waited_s=waited_s)
        self.dispatch()

    def submit_first(self, task: Task) -> None:
        """Queue a task again, first in line."""
        self.queue.append_first(task)
        self.dispatch()

    async def cancel(self, task: Task) -> None:
        """End a task that has not ended: take it out of the queue, or kill its worker.

        Where its worker is being killed already, for its deadline, wait until that is recorded.
        """
        slot = self.slot_of(task)
        if slot is None:
            self.queue.remove(task)
            self._journal.finish(task, cancelled_in_queue(task))
            self._on_freed()
            return
        process = slot.process
        assert process is not None
        if slot.state is SlotState.BUSY:
            self._cut_short(slot, task, cancelled, ExitReason.CANCELLED)
        elif process.settled.is_set():  # its worker ends for another reason
            self._finish_cut_short(slot, task, cancelled, None)
        await process.settled.wait()

    def on_expired(self, task: Task) -> None:
        assert self._queue_timeout_s is not None
        self._journal.finish(task, expired(task, self._queue_timeout_s))
        self._on_freed()

    def on_input_lost(self, task: Task) -> None:
        self._journal.finish(task, input_lost(task))
        self._on_freed()

    def on_loaded(self) -> None:
        self.dispatch()

    def _on_withdrawn(self, task: Task) -> None:
        self.queue.remove(task)
        self._on_freed()

    # --- giving out work

    def dispatch(self) -> None:
        """Give tasks to the slots that are ready."""
        if self.is_closed:
            return
        for slot in self._lives.slots:
            if slot.state is SlotState.READY:
                task = self.queue.pop()
                if task is None:
                    return
                self._give(slot, task)

    def _give(self, slot: Slot, task: Task) -> None:
        process = slot.process
        assert process is not None
        assert task.input is not None
        slot.move(SlotState.BUSY)
        slot.task = task
        self._runs += 1
        slot.run = self._runs
        process.output.begin_task(task)
        started_at = datetime.now(timezone.utc)
        deadline_at = deadline_s = None
        if task.timeout_s is not None:
            deadline_at = started_at.timestamp() + task.timeout_s
            deadline_s = slot.deadline_s = time.monotonic() + task.timeout_s
            self._set_timer(slot, task.timeout_s)
        slot.was_asked = False
        order = wire.Run(
            slot.run,
            task.function,
            task.address,
            task.attempt,
            deadline_at,
            deadline_s,
            may_be_asked=self._graces_s[task.function] > 0,
        )
        if task.number in self._to_be_stored:
            self._to_be_stored.discard(task.number)
            process.orders_unread = True  # until it is sent
            self._journal.start(task, process.reference, started_at)
            self._background.run(self._send_when_stored(slot, process, order, task))
        else:
            # The clocks were read before the worker can begin; what is recorded may come after.
            process.send(order, task.input)
            self._journal.start(task, process.reference, started_at)

    async def _send_when_stored(
        self, slot: Slot, process: WorkerProcess, order: wire.Run, task: Task
    ) -> None:
        # A disk that takes nothing must not stop what was accepted: it says so itself.
        with contextlib.suppress(JournalError):
            await self._journal.stored(task)
        if slot.task is task and slot.run == order.run and task.input is not None:
            process.orders_unread = False
            process.send(order, task.input)

    # --- taking it back

    def slot_of(self, task: Task) -> Slot | None:
        """Return the slot that runs a task."""
        return next((slot for slot in self._lives.slots if slot.task is task), None)

    def take_back(self, slot: Slot) -> Task | None:
        """Free a slot of its task, which is about to end or to be queued again."""
        task, slot.task = slot.task, None
        if slot.deadline_timer is not None:
            slot.deadline_timer.cancel()
            slot.deadline_timer = None
        return task

    def finish(self, task: Task, outcome: Outcome) -> None:
        """Record how a task ended that a worker was given."""
        self._journal.finish(task, outcome)
        if task.started_at is not None and task.finished_at is not None:
            self._estimate.note_run((task.finished_at - task.started_at).total_seconds())

    def _set_timer(self, slot: Slot, delay_s: float) -> None:
        slot.deadline_timer = self._lives.call_later(delay_s, self._on_deadline, slot)

    def _on_deadline(self, slot: Slot) -> None:
        remaining_s = slot.deadline_s - time.monotonic()
        if remaining_s > 0:  # the loop's clock stands still during a step, so its timers are early
            self._set_timer(slot, remaining_s)
            return
        task, process = slot.task, slot.process
        assert task is not None
        assert process is not None
        grace_s = 0.0 if slot.was_asked else self._graces_s[task.function]
        if grace_s > 0:
            slot.was_asked = True
            slot.deadline_s += grace_s
            process.ask()
            self._set_timer(slot, grace_s)
        else:
            self._cut_short(slot, task, timed_out, ExitReason.TIMED_OUT)

    def _cut_short(
        self,
        slot: Slot,
        task: Task,
        outcome: OutcomeOfKilled,
        reason: ExitReason,
    ) -> None:
        """Kill the worker of a running task, and record the end of that with what it was doing."""
        slot.cancel_timers()
        record = functools.partial(self._finish_cut_short, slot, task, outcome)
        self._lives.end_worker(slot, reason, then=record)

    def _finish_cut_short(
        self, slot: Slot, task: Task, outcome: OutcomeOfKilled, stack: str | None
    ) -> None:
        process = slot.process
        assert process is not None
        process.output.drain()
        self.take_back(slot)
        self.finish(task, outcome(task, process.output.tail(), stack))
        self._on_freed()
