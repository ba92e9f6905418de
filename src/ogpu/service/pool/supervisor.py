"""The supervisor: which worker runs which task, until when, and what becomes of it.

Runs in the front, on its event loop, and owns the queue and the slots; nothing else changes them.
The lives of the workers themselves are in ``lives.py``.

1. A task waits in one FIFO queue until a slot is ready; then it goes to that slot's worker, and
   its clock starts. One task a worker at a time.
2. The worker answers: the slot takes the next task first, then the answer is recorded.
3. The deadline passes: the task's end is recorded, the worker is killed.
4. A worker ends by itself: its task fails with what is known (signal, exit code, last output).
   Had it not read the order yet, the task is queued again, first in line: it is innocent. The
   third worker lost in this way is one too many: there is something about that input.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from enum import Enum

from .. import wire
from ..config import Settings
from ..errors import WireError
from ..journal import MemoryJournal, Outcome
from ..logger import logger
from ..task import Task
from .evidence import (
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
from .slot import ExitReason, Slot, SlotState

MAX_ATTEMPTS = 3


class PoolState(str, Enum):
    """What the pool as a whole is doing."""

    STARTING = "starting"  # no worker has been ready yet
    READY = "ready"
    DRAINING = "draining"
    BROKEN = "broken"


class Supervisor:
    """Owns the queue and the slots. ``on_fatal`` is called when nothing can go on."""

    def __init__(
        self,
        settings: Settings,
        functions: set[str],
        journal: MemoryJournal,
        launcher: Launcher,
        on_fatal: Callable[[Exception], None],
    ) -> None:
        self.state = PoolState.STARTING
        self.queue: deque[Task] = deque()
        self._lives = Lives(settings, functions, launcher, self)
        self.guard = self._lives.guard
        self.slots = self._lives.slots
        self._queue_size = settings.queue_size
        self._journal = journal
        self._on_fatal = on_fatal
        self._runs = 0
        self._idle = asyncio.Event()

    # --- what the rest of the front asks

    @property
    def first_ready(self) -> asyncio.Event:
        """Set when a worker has been ready for the first time."""
        return self._lives.first_ready

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
        return self.state in (PoolState.STARTING, PoolState.READY)

    def begin(self) -> None:
        """Begin to fill the slots."""
        self._lives.begin()

    def submit(self, task: Task) -> None:
        """Queue an accepted task; it runs when its turn comes."""
        self.queue.append(task)
        self.guard(self._dispatch)

    async def drain(self, timeout_s: float) -> bool:
        """Accept nothing more and let tasks end; return whether they all did in time."""
        if self.state is not PoolState.BROKEN:
            self.state = PoolState.DRAINING
        self._note_idle()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def stop(self, timeout_s: float) -> None:
        """End every worker and the template. Tasks that run are cut short, and queued again."""
        if self.state is not PoolState.BROKEN:
            self.state = PoolState.DRAINING
        await self._lives.stop(timeout_s)

    # --- giving out work

    def _dispatch(self) -> None:
        if self.state is PoolState.DRAINING and self._journal.durable:
            return  # what waits is safe, and the next start runs it
        while self.queue:
            for slot in self.slots:
                if slot.state is SlotState.READY:
                    self._give(slot, self.queue.popleft())
                    break
            else:
                return

    def _give(self, slot: Slot, task: Task) -> None:
        process = slot.process
        assert process is not None
        slot.move(SlotState.BUSY)
        slot.task = task
        self._runs += 1
        slot.run = self._runs
        process.output.begin_task(task.address)
        started_at = datetime.now(timezone.utc)
        if task.timeout_s is not None:
            slot.deadline_s = time.monotonic() + task.timeout_s
            self._set_timer(slot, task.timeout_s)
        # The clocks were read before the worker can begin; what is recorded may come after.
        process.send(wire.Run(slot.run, task.function, task.address), task.input)
        self._journal.start(task, process.reference, started_at)

    def _set_timer(self, slot: Slot, delay_s: float) -> None:
        slot.deadline_timer = self._lives.call_later(delay_s, self._on_deadline, slot)

    def _on_deadline(self, slot: Slot) -> None:
        remaining_s = slot.deadline_s - time.monotonic()
        if remaining_s > 0:  # the loop's clock stands still during a step, so its timers are early
            self._set_timer(slot, remaining_s)
            return
        process = slot.process
        assert process is not None
        process.output.drain()
        task = self._take_back(slot)
        assert task is not None
        self._journal.finish(task, timed_out(task, process.output.tail()))
        self._lives.end_worker(slot, ExitReason.TIMED_OUT)
        self._note_idle()

    def _take_back(self, slot: Slot) -> Task | None:
        """Free a slot of its task, which is about to end or to be queued again."""
        task, slot.task = slot.task, None
        if slot.deadline_timer is not None:
            slot.deadline_timer.cancel()
            slot.deadline_timer = None
        return task

    def _note_idle(self) -> None:
        if self.state is PoolState.DRAINING:
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
        if outcome.error is not None:
            outcome = with_output(outcome, slot.process.output.tail())
        task = self._take_back(slot)
        assert task is not None
        slot.tasks_done += 1
        slot.failures = 0
        slot.move(SlotState.READY)
        self.guard(self._dispatch)  # first: the worker works while the answer is recorded
        self._journal.finish(task, outcome)
        self._note_idle()

    def on_channel_error(self, process: WorkerProcess, error: WireError) -> None:
        self._lives.channel_is_broken(process, error)

    def on_channel_closed(self, process: WorkerProcess) -> None:
        self._lives.channel_is_closed(process)

    # --- what becomes of workers (LifeEvents)

    def on_ready(self, slot: Slot) -> None:
        del slot
        if self.state is PoolState.STARTING:
            self.state = PoolState.READY
        self._dispatch()

    def on_lost(self, slot: Slot, process: WorkerProcess, gone: wire.Gone) -> None:
        task = self._take_back(slot)
        if task is None:
            return
        if slot.exit_reason is ExitReason.SHUT_DOWN:
            self._journal.requeue(task)  # the next start runs it, where the journal outlives us
        elif process.orders_unread and task.attempt < MAX_ATTEMPTS:
            logger.warning("[%s] queued again: its worker died before it took it", task.address)
            task.attempt += 1
            self._journal.requeue(task)
            self.queue.appendleft(task)
            self._dispatch()
        elif process.orders_unread:
            self._journal.finish(task, interrupted(task, gone))
        else:
            broken = slot.exit_reason is ExitReason.BROKEN_CHANNEL
            output = process.output.tail()
            self._journal.finish(task, worker_died(task, gone, output, channel_broken=broken))
        self._note_idle()

    def on_fatal(self, error: Exception) -> None:
        self.state = PoolState.BROKEN
        self._on_fatal(error)
