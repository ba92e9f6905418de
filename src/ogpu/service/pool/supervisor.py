"""The supervisor: which worker runs which task, until when, and what becomes of it.

Runs in the front, on its event loop, and owns the queue and the slots; nothing else changes them.
The lives of the workers themselves are in ``lives.py``.

1. A task waits in one FIFO queue until a slot is ready; then it goes to that slot's worker, and
   its clock starts. One task a worker at a time. One that waits too long expires.
2. The worker answers: the slot takes the next task first, then the answer is recorded.
3. The deadline passes, or somebody cancels: the task's end is recorded, the worker is killed.
4. A worker ends by itself: its task fails with what is known (signal, exit code, last output).
   Had it not read the order yet, the task is queued again, first in line: it is innocent. The
   last worker that OGPU_MAX_ATTEMPTS allows is one too many: there is something about that input.
5. The front stops: what runs has a moment to end; then it is killed, and queued for the next start.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone

from .. import wire
from ..config import Settings
from ..errors import WireError
from ..events import TaskEvents
from ..journal import Journal
from ..logger import logger
from ..metrics import Metrics
from ..task import Outcome, Progress, Task
from .background import Background
from .estimate import Estimate
from .evidence import (
    cancelled,
    expired,
    failed_in_worker,
    interrupted,
    succeeded,
    timed_out,
    with_output,
    worker_died,
)
from .launcher import Launcher
from .lives import Lives
from .process import WorkerProcess
from .queue import TaskQueue
from .slot import ExitReason, Slot, SlotState
from .states import Admission, PoolState


class Supervisor:
    """Owns the queue and the slots. ``on_fatal`` is called when nothing can go on."""

    def __init__(
        self,
        settings: Settings,
        functions: set[str],
        journal: Journal,
        launcher: Launcher,
        reporters: tuple[TaskEvents, Metrics],
        on_fatal: Callable[[Exception], None],
    ) -> None:
        self._events, metrics = reporters
        self._estimate = Estimate()
        self._background = Background(self._on_defect)
        # Calls a callback of the event loop; a defect in it ends the service, in words.
        self.guard = self._background.guard
        self._lives = Lives(
            settings, functions, launcher, self, self._background, (metrics, self._estimate)
        )
        self.slots = self._lives.slots
        self.queue = TaskQueue(
            journal, self._background, settings.queue_timeout, self._on_expired, self._dispatch
        )
        self._queue_size = settings.queue_size
        self._queue_timeout_s = settings.queue_timeout
        self._max_attempts = settings.max_attempts
        self._journal = journal
        self._on_fatal = on_fatal
        self._admission = Admission.OPEN
        self._is_broken = False
        self._runs = 0
        self._idle = asyncio.Event()
        journal.on_stored(self.queue.on_stored)
        journal.on_withdrawn(self._on_withdrawn)

    # --- what the rest of the front asks

    @property
    def state(self) -> PoolState:
        """What the pool is doing."""
        if self._is_broken:
            return PoolState.BROKEN
        if self._admission is not Admission.OPEN:
            return PoolState.DRAINING
        return PoolState.READY if self.first_ready.is_set() else PoolState.STARTING

    @property
    def first_ready(self) -> asyncio.Event:
        """Set when a worker has been ready for the first time."""
        return self._lives.first_ready

    @property
    def queue_depth(self) -> int:
        """How many tasks wait for a worker."""
        return len(self.queue)

    @property
    def queue_is_full(self) -> bool:
        """True when no more tasks may wait."""
        return len(self.queue) >= self._queue_size

    @property
    def ready_workers(self) -> int:
        """How many workers have run @init and are alive, busy or not."""
        return sum(slot.state in (SlotState.READY, SlotState.BUSY) for slot in self.slots)

    @property
    def accepting(self) -> bool:
        """True when new tasks are welcome."""
        return self._admission is Admission.OPEN and not self._is_broken

    @property
    def retry_after_s(self) -> int:
        """In how many seconds the pool is expected to have worked off its queue."""
        return self._estimate.retry_after_s(
            waiting=len(self.queue), slots=len(self.slots), ready=self.ready_workers
        )

    def count_workers(self) -> dict[str, int]:
        """Return how many slots are in each state."""
        counts = Counter(slot.state.value for slot in self.slots)
        return {state.value: counts[state.value] for state in SlotState}

    def output_of(self, task: Task) -> str | None:
        """Return the last lines that a task has printed until now."""
        slot = self._slot_of(task)
        if slot is None or slot.process is None:
            return task.output
        slot.process.output.drain()
        return slot.process.output.tail()

    # --- what the rest of the front wants

    def begin(self) -> None:
        """Begin to fill the slots."""
        self._lives.begin()

    def submit(self, task: Task, *, waited_s: float = 0.0) -> None:
        """Queue a task; it runs when its turn comes."""
        self.queue.append(task, waited_s=waited_s)
        self.guard(self._dispatch)

    def cancel(self, task: Task) -> None:
        """End a task that has not ended: take it out of the queue, or kill its worker."""
        slot = self._slot_of(task)
        if slot is None:
            self.queue.remove(task)
            self._journal.finish(task, cancelled(task, None))
        else:
            self._cut_short(slot, task, cancelled, ExitReason.CANCELLED)

    def pause(self) -> None:
        """Accept nothing more, until ``resume``; what was accepted goes on."""
        if self._admission is Admission.OPEN:
            self._admission = Admission.PAUSED
            logger.info("Draining: nothing more is accepted until POST /resume")

    def resume(self) -> bool:
        """Accept tasks again; return False where the service is about to stop."""
        if self._admission is Admission.PAUSED:
            self._admission = Admission.OPEN
            logger.info("Accepting tasks again")
        return self._admission is Admission.OPEN

    async def drain(self, timeout_s: float) -> bool:
        """Accept nothing more for good and let tasks end; return whether they did in time."""
        self._admission = Admission.CLOSED
        self._note_idle()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def stop(self, timeout_s: float) -> None:
        """End every worker and the template. Tasks that run are cut short, and queued again."""
        self._admission = Admission.CLOSED
        self.queue.close()
        await self._lives.stop(timeout_s)
        for slot in self.slots:  # those whose death the template could not tell any more
            task = self._take_back(slot)
            if task is not None:
                self._journal.requeue(task)
        await self._background.cancel()

    # --- giving out work

    def _dispatch(self) -> None:
        if self._admission is Admission.CLOSED and self._journal.durable:
            return  # what waits is safe, and the next start runs it
        for slot in self.slots:
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
        # The clocks were read before the worker can begin; what is recorded may come after.
        order = wire.Run(
            slot.run, task.function, task.address, task.attempt, deadline_at, deadline_s
        )
        process.send(order, task.input)
        self._journal.start(task, process.reference, started_at)

    def _set_timer(self, slot: Slot, delay_s: float) -> None:
        slot.deadline_timer = self._lives.call_later(delay_s, self._on_deadline, slot)

    def _on_deadline(self, slot: Slot) -> None:
        remaining_s = slot.deadline_s - time.monotonic()
        if remaining_s > 0:  # the loop's clock stands still during a step, so its timers are early
            self._set_timer(slot, remaining_s)
            return
        assert slot.task is not None
        self._cut_short(slot, slot.task, timed_out, ExitReason.TIMED_OUT)

    def _cut_short(
        self,
        slot: Slot,
        task: Task,
        outcome: Callable[[Task, str | None], Outcome],
        reason: ExitReason,
    ) -> None:
        """Record the end of a running task, then kill its worker."""
        assert slot.process is not None
        slot.process.output.drain()
        self._take_back(slot)
        self._finish(task, outcome(task, slot.process.output.tail()))
        self._lives.end_worker(slot, reason)
        self._note_idle()

    def _take_back(self, slot: Slot) -> Task | None:
        """Free a slot of its task, which is about to end or to be queued again."""
        task, slot.task = slot.task, None
        if slot.deadline_timer is not None:
            slot.deadline_timer.cancel()
            slot.deadline_timer = None
        return task

    def _finish(self, task: Task, outcome: Outcome) -> None:
        self._journal.finish(task, outcome)
        if task.started_at is not None and task.finished_at is not None:
            self._estimate.note_run((task.finished_at - task.started_at).total_seconds())

    def _slot_of(self, task: Task) -> Slot | None:
        return next((slot for slot in self.slots if slot.task is task), None)

    def _on_expired(self, task: Task) -> None:
        assert self._queue_timeout_s is not None
        self._journal.finish(task, expired(task, self._queue_timeout_s))

    def _on_withdrawn(self, task: Task) -> None:
        self.queue.remove(task)

    def _note_idle(self) -> None:
        if self._admission is Admission.CLOSED:
            busy = any(slot.task is not None for slot in self.slots)
            if not busy and (self._journal.durable or not self.queue):
                self._idle.set()

    # --- what a worker says (WorkerEvents)

    def on_message(self, process: WorkerProcess, message: wire.Message, payload: bytes) -> None:
        slot = self._lives.slot_of(process)
        if slot is None:
            return
        match message:
            case wire.Done():
                outcome = succeeded(payload)
                self._on_answer(slot, message.run, outcome, has_output=message.has_output)
            case wire.Failed():
                self._on_answer(slot, message.run, failed_in_worker(message), has_output=True)
            case wire.Progressed():
                self._on_progress(slot, message)
            case wire.Ready():
                self._lives.worker_is_ready(slot, message)
            case wire.InitFailed():
                self._lives.init_has_failed(slot, message)
            case _:
                raise WireError(f"a worker does not say {type(message).__name__}")

    def _on_answer(self, slot: Slot, run: int, outcome: Outcome, *, has_output: bool) -> None:
        if slot.state is not SlotState.BUSY or run != slot.run or slot.process is None:
            logger.warning("Worker %d answered late (run %s); dropped", slot.index, run)
            return
        slot.process.output.end_task(read_first=has_output)
        output = slot.process.output.tail()
        if output is not None:
            outcome = with_output(outcome, output)
        task = self._take_back(slot)
        assert task is not None
        slot.tasks_done += 1
        slot.failures = 0
        slot.move(SlotState.READY)
        self.guard(self._dispatch)  # first: the worker works while the answer is recorded
        self._finish(task, outcome)
        self._note_idle()

    def _on_progress(self, slot: Slot, message: wire.Progressed) -> None:
        if slot.task is None or message.run != slot.run:
            return  # of a task that has ended
        if not 0.0 <= message.fraction <= 1.0:
            raise WireError(f"a fraction is not {message.fraction}")
        self._journal.note_progress(slot.task, Progress(message.fraction, message.message))
        self._events.on_progress(slot.task)

    def on_line(self, task: Task, line: str) -> None:
        self._events.on_line(task, line)

    def on_channel_error(self, process: WorkerProcess, error: WireError) -> None:
        self._lives.channel_is_broken(process, error)

    def on_channel_closed(self, process: WorkerProcess) -> None:
        self._lives.channel_is_closed(process)

    # --- what becomes of workers (LifeEvents)

    def on_ready(self, slot: Slot) -> None:
        del slot
        self._dispatch()

    def on_lost(self, slot: Slot, process: WorkerProcess, gone: wire.Gone) -> None:
        task = self._take_back(slot)
        if task is None:
            return
        if slot.exit_reason is ExitReason.SHUT_DOWN:
            self._journal.requeue(task)  # the next start runs it, where the journal outlives us
        elif process.orders_unread and task.attempt < self._max_attempts:
            logger.warning("[%s] queued again: its worker died before it took it", task.address)
            self._journal.requeue(task)
            self.queue.append_first(task)
            self._dispatch()
        elif process.orders_unread:
            self._finish(task, interrupted(task, gone))
        else:
            broken = slot.exit_reason is ExitReason.BROKEN_CHANNEL
            output = process.output.tail()
            self._finish(task, worker_died(task, gone, output, channel_broken=broken))
        self._note_idle()

    def on_fatal(self, error: Exception) -> None:
        self._is_broken = True
        self._on_fatal(error)

    def _on_defect(self, error: BaseException) -> None:
        self._lives.on_defect(error)
