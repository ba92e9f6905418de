"""The supervisor: which worker runs which task, until when, and what follows every death.

Runs in the front, on its event loop, and owns the queue and the slots; nothing else changes them.

1. Slot 0 is launched alone: its @init may download. When it is ready, the others are launched.
   If it fails before any worker was ever ready, the start has failed (FirstInitError).
2. A task waits in one FIFO queue until a slot is ready; then it goes to that slot's worker, and
   its clock starts. One task a worker at a time.
3. The worker answers: the slot takes the next task first, then the answer is recorded.
4. The deadline passes: the task's end is recorded, the worker is killed, the slot is stopping.
5. A worker dies by itself: its task fails with what is known (signal, exit code, last output).
   Had it not read the order yet, the task is queued again, first in line: it is innocent.
6. The template says Gone, when nothing of the worker is left: only now the slot is filled again,
   at once where the worker had been of use, else after a back-off.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from enum import Enum

from .. import wire
from ..backoff import Backoff
from ..config import Settings
from ..errors import FirstInitError, PoolBrokenError, WireError
from ..journal import MemoryJournal, Outcome
from ..logger import logger
from ..task import Task, WorkerReference
from .background import Background
from .evidence import (
    describe_end,
    failed_in_worker,
    succeeded,
    timed_out,
    with_output,
    worker_died,
)
from .launcher import Launcher
from .process import WorkerProcess
from .slot import Exit, ExitReason, Slot, SlotState

RESTART_BACKOFF = Backoff(first_s=0.2, limit_s=30.0)
# A process closes its descriptors shortly before it is dead (GPU drivers take their time there);
# one that closed its channel and is still there after this was not dying, and is of no use.
CHANNEL_GRACE_S = 1.0
GOODBYE_S = 1.0
# Beside the result itself a Done frame carries nothing; a Failed frame has an empty payload.
_PAYLOAD_SLACK_BYTES = 1024


class PoolState(str, Enum):
    """What the pool as a whole is doing."""

    STARTING = "starting"  # no worker has been ready yet
    READY = "ready"
    DRAINING = "draining"
    BROKEN = "broken"


class Supervisor:
    """Owns the queue and the slots. ``on_fatal`` is called once, when nothing can go on."""

    def __init__(
        self,
        settings: Settings,
        functions: set[str],
        journal: MemoryJournal,
        launcher: Launcher,
        on_fatal: Callable[[Exception], None],
    ) -> None:
        self.state = PoolState.STARTING
        self.slots = [Slot(index) for index in range(settings.slots)]
        self.queue: deque[Task] = deque()
        self.first_ready = asyncio.Event()
        self._settings = settings
        self._functions = functions
        self._journal = journal
        self._launcher = launcher
        self._on_fatal = on_fatal
        self._runs = 0
        self._loop = asyncio.get_running_loop()
        self._background = Background(self._on_defect)
        self._idle = asyncio.Event()
        self._all_gone = asyncio.Event()

    # --- what the rest of the front asks

    def adopt_first_launch(self) -> None:
        """Take over slot 0, whose launch was ordered before the event loop ran."""
        self.slots[0].begin_worker()
        self._launcher.listen(self)

    @property
    def queue_is_full(self) -> bool:
        """True when no more tasks may wait."""
        return len(self.queue) >= self._settings.queue_size

    @property
    def ready_workers(self) -> int:
        """How many workers have run @init and are alive, busy or not."""
        return sum(slot.state in (SlotState.READY, SlotState.BUSY) for slot in self.slots)

    @property
    def accepting(self) -> bool:
        """True when new tasks are welcome."""
        return self.state in (PoolState.STARTING, PoolState.READY)

    def submit(self, task: Task) -> None:
        """Queue an accepted task; it runs when its turn comes."""
        self.queue.append(task)
        self._dispatch()

    async def drain(self, timeout_s: float) -> bool:
        """Accept nothing more and let tasks end; return whether they all did in time."""
        self.state = PoolState.DRAINING
        self._note_idle()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def stop(self, timeout_s: float) -> None:
        """End every worker and the template: the idle ones by themselves, the rest killed."""
        self.state = PoolState.DRAINING
        for slot in self.slots:
            for timer in (slot.backoff_timer, slot.deadline_timer):
                if timer is not None:
                    timer.cancel()
            if slot.process is not None and slot.state is not SlotState.STOPPING:
                idle = slot.state is SlotState.READY
                self._end_worker(slot, ExitReason.SHUT_DOWN, kill=not idle)
        self._note_gone()
        # The template kills what is left, so this only gives the idle ones time to say goodbye.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_gone.wait(), GOODBYE_S)
        await self._launcher.shut_down(timeout_s)
        for slot in self.slots:
            if slot.process is not None:
                await slot.process.bury()
        await self._background.cancel()

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
        self._journal.start(task, self._reference(slot, process))
        if task.timeout_s is not None:
            slot.deadline_s = time.monotonic() + task.timeout_s
            slot.deadline_timer = self._loop.call_later(task.timeout_s, self._on_deadline, slot)
        process.send(wire.Run(slot.run, task.function, task.address), task.input)

    def _take_back(self, slot: Slot) -> Task | None:
        """Free a slot of its task, which is about to end or to be queued again."""
        task, slot.task = slot.task, None
        if slot.deadline_timer is not None:
            slot.deadline_timer.cancel()
            slot.deadline_timer = None
        return task

    # --- what a worker says

    def on_message(self, process: WorkerProcess, message: wire.Message, payload: bytes) -> None:
        slot = self._slot_of(process)
        if slot is None:
            return
        match message:
            case wire.Done():
                self._on_answer(
                    slot, message.run, succeeded(payload), has_output=message.has_output
                )
            case wire.Failed():
                self._on_answer(slot, message.run, failed_in_worker(message), has_output=True)
            case wire.Ready():
                self._on_ready(slot, message)
            case wire.InitFailed():
                self._on_init_failed(slot, message)
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
        self._dispatch()  # first: the worker has something to do while the answer is recorded
        self._journal.finish(task, outcome)
        self._note_idle()

    def _on_ready(self, slot: Slot, ready: wire.Ready) -> None:
        if slot.state is not SlotState.STARTING:
            return
        missing = self._functions - set(ready.functions)
        if missing:
            why = (
                f"the source did not register {', '.join(sorted(missing))} when a worker imported "
                'it again; is @expose under `if __name__ == "__main__"`?'
            )
            self._on_init_failed(slot, wire.InitFailed("ImportError", why, why))
            return
        logger.info("Worker %d is ready (init took %.2f s)", slot.index, ready.init_s)
        slot.move(SlotState.READY)
        if self.state is PoolState.STARTING:
            self.state = PoolState.READY
            self.first_ready.set()
            for other in self.slots[1:]:
                self._launch(other)
        self._dispatch()

    def _on_init_failed(self, slot: Slot, failed: wire.InitFailed) -> None:
        logger.error("Init failed in worker %d:\n%s", slot.index, failed.traceback.rstrip())
        if slot.state is SlotState.STARTING:
            self._end_worker(slot, ExitReason.INIT_FAILED)

    # --- how a worker ends

    def _on_deadline(self, slot: Slot) -> None:
        remaining_s = slot.deadline_s - time.monotonic()
        if remaining_s > 0:  # the loop's clock stands still during a step, so its timers are early
            slot.deadline_timer = self._loop.call_later(remaining_s, self._on_deadline, slot)
            return
        task = slot.task
        assert task is not None
        assert slot.process is not None
        self._end_worker(slot, ExitReason.TIMED_OUT)
        slot.process.output.drain()
        self._take_back(slot)
        self._journal.finish(task, timed_out(task, slot.process.output.tail()))
        self._note_idle()

    def _end_worker(self, slot: Slot, reason: ExitReason, *, kill: bool = True) -> None:
        slot.exit_reason = slot.exit_reason or reason
        slot.move(SlotState.STOPPING)
        if slot.process is not None:
            if kill:
                slot.process.kill()
            else:
                slot.process.dismiss()

    def on_channel_error(self, process: WorkerProcess, error: WireError) -> None:
        slot = self._slot_of(process)
        if slot is not None and slot.state is not SlotState.STOPPING:
            logger.error("Worker %d broke its channel (%s); killing it", slot.index, error)
            self._end_worker(slot, ExitReason.BROKEN_CHANNEL)

    def on_channel_closed(self, process: WorkerProcess) -> None:
        slot = self._slot_of(process)
        if slot is not None and slot.state is not SlotState.STOPPING:
            # Either it is dying, and Gone is on its way, or it cannot be reached any more.
            self._loop.call_later(CHANNEL_GRACE_S, self._kill_unreachable, process)

    def _kill_unreachable(self, process: WorkerProcess) -> None:
        slot = self._slot_of(process)
        if slot is not None and slot.state is not SlotState.STOPPING:
            logger.error("Worker %d closed its channel; killing it", slot.index)
            self._end_worker(slot, ExitReason.BROKEN_CHANNEL)

    # --- what the template says (LaunchEvents)

    def on_launched(self, launched: wire.Launched, descriptors: list[int]) -> None:
        slot = self.slots[launched.slot]
        channel_fd, output_fd, pidfd = descriptors
        limit = self._settings.max_result_bytes + _PAYLOAD_SLACK_BYTES
        slot.process = WorkerProcess(launched, channel_fd, output_fd, pidfd, limit, self)
        self._background.run(slot.process.connect())
        if slot.state is SlotState.STOPPING:  # the service is stopping meanwhile
            slot.process.kill()

    def on_launch_failed(self, failed: wire.LaunchFailed) -> None:
        slot = self.slots[failed.slot]
        logger.error("No worker could be made for slot %d: %s", slot.index, failed.message)
        if slot.state is SlotState.STARTING:
            slot.move(SlotState.STOPPING)
        slot.exit_reason = ExitReason.DIED
        self._refill(slot, useful=False)

    def on_gone(self, gone: wire.Gone) -> None:
        self._background.run(self._bury(self.slots[gone.slot], gone))

    def on_template_lost(self) -> None:
        if self.state is not PoolState.BROKEN:
            self.state = PoolState.BROKEN
            self._on_fatal(PoolBrokenError("the template process is gone, and its workers with it"))

    async def _bury(self, slot: Slot, gone: wire.Gone) -> None:
        process = slot.process
        assert process is not None
        await process.bury()
        if slot.state is not SlotState.STOPPING:
            slot.exit_reason = ExitReason.DIED
            slot.move(SlotState.STOPPING)
        reason = slot.exit_reason or ExitReason.DIED
        slot.last_exit = Exit(reason, signal=gone.signal, exit_code=gone.exit_code)
        slot.process = None
        if reason is not ExitReason.SHUT_DOWN:
            how = describe_end(gone)
            logger.warning("Worker %d (pid %d) %s", slot.index, process.pid, how)
        had_entered = slot.task is not None and not process.orders_unread
        useful = slot.tasks_done > 0 or had_entered or reason is ExitReason.TIMED_OUT
        self._settle_lost_task(slot, process, gone)
        self._refill(slot, useful=useful)
        self._note_gone()

    def _settle_lost_task(self, slot: Slot, process: WorkerProcess, gone: wire.Gone) -> None:
        task = self._take_back(slot)
        if task is None:
            return
        if slot.exit_reason is ExitReason.SHUT_DOWN:
            self._journal.requeue(task)  # the next start runs it, where the journal outlives us
            return
        if process.orders_unread:
            logger.warning("[%s] queued again: its worker died before it took it", task.address)
            self._journal.requeue(task)
            self.queue.appendleft(task)
            return
        broken = slot.exit_reason is ExitReason.BROKEN_CHANNEL
        output = process.output.tail()
        self._journal.finish(task, worker_died(task, gone, output, channel_broken=broken))
        self._note_idle()

    def _refill(self, slot: Slot, *, useful: bool) -> None:
        if self.state is PoolState.STARTING:
            how = slot.last_exit
            reason = (
                "its @init failed" if how and how.reason is ExitReason.INIT_FAILED else "it died"
            )
            self.state = PoolState.BROKEN
            self._on_fatal(FirstInitError(f"the first worker did not become ready: {reason}"))
        elif slot.exit_reason is ExitReason.SHUT_DOWN or self.state is PoolState.BROKEN:
            return
        elif useful:
            slot.failures = 0
            self._launch(slot)
        else:
            slot.failures += 1
            wait_s = RESTART_BACKOFF.wait_s(slot.failures)
            logger.warning("Slot %d: next try in %.1f s", slot.index, wait_s)
            slot.move(SlotState.BACKING_OFF)
            slot.backoff_timer = self._loop.call_later(wait_s, self._launch, slot)

    # --- helpers

    def _launch(self, slot: Slot) -> None:
        slot.backoff_timer = None
        if slot.state is not SlotState.STARTING:
            slot.move(SlotState.STARTING)
        slot.begin_worker()
        self._launcher.launch(slot.index, slot.generation)

    def _note_idle(self) -> None:
        if self.state is PoolState.DRAINING:
            busy = any(slot.task is not None for slot in self.slots)
            if not busy and (self._journal.durable or not self.queue):
                self._idle.set()

    def _note_gone(self) -> None:
        if all(slot.process is None for slot in self.slots):
            self._all_gone.set()
        else:
            self._all_gone.clear()

    def _slot_of(self, process: WorkerProcess) -> Slot | None:
        """Return the slot that a worker fills, or None: it has been buried, this is late news."""
        slot = self.slots[process.slot]
        return slot if slot.process is process else None

    def _on_defect(self, error: BaseException) -> None:
        self._on_fatal(PoolBrokenError(f"the supervisor failed: {error!r}"))

    @staticmethod
    def _reference(slot: Slot, process: WorkerProcess) -> WorkerReference:
        return WorkerReference(slot.index, slot.generation, process.pid, slot.device)
