"""The supervisor: the pool as the rest of the front sees it, and what workers say and come to.

Runs in the front, on its event loop. It owns the slots, whose lives are in ``lives.py``, and the
queue, which ``dispatcher.py`` works off; nothing else changes them.

1. A task is submitted; the dispatcher gives it to a worker when its turn comes.
2. The worker answers, for each task of a batch by itself: after the last answer the slot takes the
   next task first, or has taken it already, then that answer is recorded.
3. A worker ends by itself: its task fails with what is known (signal, exit code, last output).
   Had it not read the order yet, the task is queued again, first in line: it is innocent. The
   last worker that OGPU_MAX_ATTEMPTS allows is one too many: there is something about that input.
   Had the template died, and the worker with it, the task is queued again likewise. Of a batch that
   killed its worker each task runs again, alone, so that only the guilty one fails.
4. A worker asks to be replaced, or has had its share of tasks: it is recycled before the next one.
5. The front stops: what runs has a moment to end; then it is killed, and queued for the next start.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from .. import wire
from ..config import Settings
from ..errors import FirstInitError, PoolBrokenError, WireError
from ..events import TaskEvents
from ..handler import Handler
from ..journal import Journal
from ..logger import logger
from ..metrics import Metrics
from ..task import Outcome, Progress, Task
from .background import Background
from .dispatcher import Dispatcher
from .estimate import Estimate
from .evidence import (
    failed_in_worker,
    interrupted,
    recycle_reason,
    stopped_in_time,
    succeeded,
    timed_out,
    with_output,
    worker_died,
)
from .lives import Lives
from .places import Places
from .process import WorkerProcess
from .slot import ExitReason, Slot, SlotState
from .states import Admission, PoolState


class OnFatal(Protocol):
    """Who ends the service."""

    def __call__(self, error: Exception, *, at_once: bool) -> None:
        """Take notice that nothing can go on."""


class Supervisor:
    """Owns the queue and the slots. ``on_fatal`` is called when nothing can go on.

    ``at_once`` says that nobody is to be told first, and no task waited for.
    """

    def __init__(
        self,
        settings: Settings,
        handlers: dict[str, Handler],
        journal: Journal,
        places: Places,
        reporters: tuple[TaskEvents, Metrics],
        on_fatal: OnFatal,
    ) -> None:
        self._events, metrics = reporters
        self._estimate = Estimate()
        self._background = Background(self.on_defect)
        # Calls a callback of the event loop; a defect in it ends the service, in words.
        self.guard = self._background.guard
        self._lives = Lives(
            settings, set(handlers), places, self, self._background, (metrics, self._estimate)
        )
        self.slots = self._lives.slots
        self._dispatcher = Dispatcher(
            self._lives,
            journal,
            self._background,
            (metrics, self._estimate),
            (settings, handlers),
            self._note_idle,
        )
        self._queue_size = settings.queue_size
        self._devices = places.devices
        self._max_attempts = settings.max_attempts
        self._journal = journal
        self._on_fatal = on_fatal
        self._admission = Admission.OPEN
        self.broken_by: Exception | None = None  # why nothing can go on
        self._idle = asyncio.Event()

    # --- what the rest of the front asks

    @property
    def state(self) -> PoolState:
        """What the pool is doing."""
        if self.broken_by is not None:
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
        return self._dispatcher.waiting

    @property
    def ready_workers(self) -> int:
        """How many workers have run @init and are alive, busy or not."""
        return sum(slot.state in (SlotState.READY, SlotState.BUSY) for slot in self.slots)

    @property
    def has_room(self) -> bool:
        """True when a new task is welcome, and may wait."""
        return self.accepting and self._dispatcher.waiting < self._queue_size

    @property
    def accepting(self) -> bool:
        """True when new tasks are welcome."""
        return self._admission is Admission.OPEN and self.broken_by is None

    @property
    def retry_after_s(self) -> int:
        """In how many seconds the pool is expected to have worked off its queue."""
        return self._estimate.retry_after_s(
            waiting=self.queue_depth, slots=len(self.slots), ready=self.ready_workers
        )

    def count_workers(self) -> dict[str, int]:
        """Return how many slots are in each state."""
        counts = Counter(slot.state.value for slot in self.slots)
        return {state.value: counts[state.value] for state in SlotState}

    def device_memory(self) -> Iterable[tuple[int, str, int, int]]:
        """Return slot, device, used and total bytes, wherever that is known."""
        for slot, device, memory in self._devices.memory():
            yield slot, device, memory.used_bytes, memory.total_bytes

    def output_of(self, task: Task) -> str | None:
        """Return the last lines that a task has printed until now."""
        slot = self._dispatcher.slot_of(task)
        if slot is None or slot.process is None:
            return task.output
        slot.process.hear()
        if task in slot.tasks.values():
            slot.process.output.drain()
            return slot.process.output.tail()
        return task.output

    # --- what the rest of the front wants

    def begin(self) -> None:
        """Begin to fill the slots."""
        self._lives.begin()

    def submit(self, task: Task) -> None:
        """Queue a new task; it runs when its turn comes."""
        self.guard(self._dispatcher.submit, task)

    def resubmit(self, task: Task, *, waited_s: float = 0.0) -> None:
        """Queue a task of an earlier front, which has waited for so long already."""
        self.guard(self._dispatcher.resubmit, task, waited_s)

    async def cancel(self, task: Task) -> None:
        """End a task that has not ended: take it out of the queue, or kill its worker."""
        await self._dispatcher.cancel(task)

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
        self._close()
        self._note_idle()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def stop(self, timeout_s: float) -> None:
        """End every worker and the template. Tasks that run are cut short, and queued again."""
        self._close()
        self._dispatcher.queue.close()
        await self._lives.stop(timeout_s)
        for slot in self.slots:  # those whose death the template could not tell any more
            for task in self._dispatcher.take_back_all(slot):
                self._journal.requeue(task, is_loss=self.broken_by is not None)
        await self._background.cancel()

    def _close(self) -> None:
        self._admission = Admission.CLOSED
        # What waits is safe where the journal outlives us, and the next start runs it.
        self._dispatcher.close(is_kept=self._journal.durable)

    def _note_idle(self) -> None:
        if self._admission is Admission.CLOSED:
            busy = any(slot.tasks for slot in self.slots)
            if not busy and (self._journal.durable or not self.queue_depth):
                self._idle.set()

    # --- what a worker says (WorkerEvents)

    def on_message(self, process: WorkerProcess, message: wire.Message, payload: bytes) -> None:
        slot = self._lives.slot_of(process)
        if slot is None:
            return
        match message:
            case wire.Done():
                self._on_answer(
                    slot, message, succeeded(message, payload), has_output=message.has_output
                )
            case wire.Failed():
                self._on_answer(slot, message, failed_in_worker(message), has_output=True)
            case wire.Progressed():
                self._on_progress(slot, message)
            case wire.Ready():
                self._lives.worker_is_ready(slot, message)
            case wire.InitFailed():
                self._lives.init_has_failed(slot, message)
            case _:
                raise WireError(f"a worker does not say {type(message).__name__}")

    def _on_answer(
        self, slot: Slot, answer: wire.Done | wire.Failed, outcome: Outcome, *, has_output: bool
    ) -> None:
        if slot.state is not SlotState.BUSY or answer.run not in slot.tasks or slot.process is None:
            logger.warning("Worker %d answered late (run %s); dropped", slot.index, answer.run)
            return
        took = self._order_taken(slot, answer)
        recycle = None if answer.recycle is None else recycle_reason(answer.recycle)
        task, given = self._dispatcher.take_back(slot, answer.run), slot.given
        if slot.tasks:  # what the batch prints is shown with each task of it
            slot.process.output.drain()
        else:
            slot.process.output.end_tasks(read_first=has_output)
        if slot.was_asked:
            outcome = stopped_in_time(task, outcome)
        output = slot.process.output.tail()
        if output is not None:
            outcome = with_output(outcome, output)
        slot.tasks_done += 1
        slot.failures = 0
        slot.recycle = recycle or slot.recycle
        if took is not None:
            self._dispatcher.begin_ahead(slot, took)
            self.guard(self._dispatcher.dispatch)
        elif not slot.tasks:
            self._go_on(slot)  # it works while the answer is recorded
        self._dispatcher.finish(task, outcome, given)
        self._note_idle()

    def _order_taken(self, slot: Slot, answer: wire.Done | wire.Failed) -> int | None:
        """Return which order ahead a worker has gone on to; None: it waits for the next one."""
        took = answer.took if isinstance(answer, wire.Done) else None
        if took is None:
            if not self._dispatcher.ahead.take_back_first(slot):
                raise WireError("it took an order ahead, and does not say so")
        elif took not in slot.ahead or len(slot.tasks) > 1:
            raise WireError(f"it cannot have taken the order {took}")
        return took

    def _go_on(self, slot: Slot) -> None:
        """Let a worker that has answered have the next task, or be replaced."""
        slot.move(SlotState.READY)
        if self._lives.recycle_if_wanted(slot):
            self._dispatcher.ahead.take_back(slot)
        self.guard(self._dispatcher.dispatch)
        if slot.state is SlotState.READY:
            self._dispatcher.ahead.take_back(slot)

    def _on_progress(self, slot: Slot, message: wire.Progressed) -> None:
        task = slot.tasks.get(message.run)
        if task is None:
            return  # it has ended
        if not 0.0 <= message.fraction <= 1.0:
            raise WireError(f"a fraction is not {message.fraction}")
        text = message.message and message.message[: wire.MAX_PROGRESS_CHARS]
        self._journal.note_progress(task, Progress(message.fraction, text))
        self._events.on_progress(task)

    def on_line(self, task: Task, line: str) -> None:
        self._events.on_line(task, line)

    def on_channel_error(self, process: WorkerProcess, error: WireError) -> None:
        self._lives.channel_is_broken(process, error)

    def on_channel_closed(self, process: WorkerProcess) -> None:
        self._lives.channel_is_closed(process)

    def on_ended(self, process: WorkerProcess) -> None:
        self._lives.worker_has_ended(process)

    # --- what becomes of workers (LifeEvents)

    def on_ready(self, slot: Slot) -> None:
        del slot
        self._dispatcher.dispatch()

    def on_lost(self, slot: Slot, process: WorkerProcess, gone: wire.Gone) -> None:
        tasks = self._dispatcher.take_back_all(slot)
        self._dispatcher.return_ahead(slot)
        if not tasks:
            return
        output, stack = process.output.tail(), process.stacks()
        if slot.was_asked:  # they are past their deadline, whatever the worker came to in the grace
            for task in tasks:
                self._dispatcher.finish(task, timed_out(task, output, stack), slot.given)
        elif slot.exit_reason is ExitReason.SHUT_DOWN:
            # The next start runs them, where the journal outlives us.
            for task in tasks:
                self._journal.requeue(task, is_loss=self.broken_by is not None)
        elif process.orders_unread or slot.exit_reason is ExitReason.TEMPLATE_DIED:
            self._on_innocents(tasks, gone, have_begun=not process.orders_unread)
        elif slot.given > 1:
            self._on_suspects(tasks)
        else:
            broken = slot.exit_reason is ExitReason.BROKEN_CHANNEL
            outcome = worker_died(
                tasks[0], gone, output, stack, channel_broken=broken, memory=process.memory
            )
            self._dispatcher.finish(tasks[0], outcome)
        self._note_idle()

    def _on_innocents(self, tasks: list[Task], gone: wire.Gone, *, have_begun: bool) -> None:
        """Run tasks again that are not at fault for the end of their worker, or so it seems."""
        when = "with its template" if have_begun else "before it took the task"
        again = [task for task in tasks if task.losses + 1 < self._max_attempts]
        for task in tasks:
            if task in again:
                logger.warning("[%s] queued again: its worker died %s", task.address, when)
                self._journal.requeue(task, is_loss=True)
            else:
                self._dispatcher.finish(task, interrupted(task, gone, when))
        self._dispatcher.submit_first(again)

    def _on_suspects(self, tasks: list[Task]) -> None:
        """Run the tasks of a batch that has killed its worker again, one at a time."""
        for task in tasks:
            logger.warning("[%s] queued again, alone: its batch killed the worker", task.address)
            self._journal.requeue(task, is_loss=False)
        self._dispatcher.submit_alone(tasks)

    def on_broken(self, error: Exception) -> None:
        self.broken_by = self.broken_by or error
        self._on_fatal(error, at_once=isinstance(error, FirstInitError))

    def on_defect(self, error: BaseException) -> None:
        """End the service: something is wrong with this package itself."""
        defect = error
        if not isinstance(defect, PoolBrokenError):
            defect = PoolBrokenError(f"the pool has a defect: {error!r}")
        self.broken_by = self.broken_by or defect
        self._on_fatal(defect, at_once=True)
