"""The lives of workers: launched, ready, ending, gone, and who takes their place.

Runs in the front, on its event loop. It knows slots and processes; what becomes of the task of a
worker that ends is the supervisor's business (``LifeEvents``).

1. Slot 0 is launched alone: its @init may download. When it is ready, the others are launched.
   If it fails before any worker was ever ready, the start has failed (FirstInitError).
2. A worker ends: killed by us (deadline, broken channel), by others, or by itself.
3. The template says Gone, when nothing of the worker is left. Only then is the slot filled again,
   at once where the worker had been of use, else after a back-off.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Protocol

from .. import wire
from ..backoff import Backoff
from ..config import Settings
from ..errors import FirstInitError, PoolBrokenError, WireError
from ..logger import logger
from ..metrics import Metrics
from .background import Background
from .estimate import Estimate
from .evidence import describe_end
from .launcher import Launcher
from .process import WorkerEvents, WorkerProcess
from .slot import Exit, ExitReason, Slot, SlotState

RESTART_BACKOFF = Backoff(first_s=0.2, limit_s=30.0)
# A process closes its descriptors shortly before it is dead (GPU drivers take their time there);
# one that closed its channel and is still there after this was not dying, and is of no use.
CHANNEL_GRACE_S = 1.0
GOODBYE_S = 1.0
GONE_LIMIT_S = 5.0
# Beside the result itself a Done frame carries nothing; a Failed frame has an empty payload.
_PAYLOAD_SLACK_BYTES = 1024


class LifeEvents(WorkerEvents, Protocol):
    """Who has work for the workers."""

    def on_ready(self, slot: Slot) -> None:
        """Take notice that a worker takes tasks."""

    def on_lost(self, slot: Slot, process: WorkerProcess, gone: wire.Gone) -> None:
        """Settle the task of a worker that is gone, if it had one."""

    def on_fatal(self, error: Exception) -> None:
        """Take notice that the pool cannot go on."""


class Lives:
    """Fills the slots, and fills them again."""

    def __init__(
        self,
        settings: Settings,
        functions: set[str],
        launcher: Launcher,
        events: LifeEvents,
        background: Background,
        meters: tuple[Metrics, Estimate],
    ) -> None:
        self.slots = [Slot(index) for index in range(settings.slots)]
        self.first_ready = asyncio.Event()
        self._max_payload_bytes = settings.max_result_bytes + _PAYLOAD_SLACK_BYTES
        self._functions = functions
        self._launcher = launcher
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._background = background
        self.guard = background.guard
        self._metrics, self._estimate = meters
        self._all_gone = asyncio.Event()
        self._stopping = False

    def begin(self) -> None:
        """Take over slot 0, whose launch was ordered before the event loop ran."""
        self.slots[0].begin_worker()
        self._launcher.listen(self)

    def call_later(
        self, delay_s: float, function: Callable[..., None], *arguments: object
    ) -> asyncio.TimerHandle:
        """Call a function later, guarded."""
        return self._loop.call_later(delay_s, self.guard, function, *arguments)

    def slot_of(self, process: WorkerProcess) -> Slot | None:
        """Return the slot that a worker fills, or None: it has been buried, this is late news."""
        slot = self.slots[process.slot]
        return slot if slot.process is process else None

    async def stop(self, timeout_s: float) -> None:
        """End every worker and the template: the idle ones by themselves, the rest killed."""
        self._stopping = True
        for slot in self.slots:
            for timer in (slot.backoff_timer, slot.deadline_timer):
                if timer is not None:
                    timer.cancel()
            if slot.process is not None and slot.state is not SlotState.STOPPING:
                idle = slot.state is SlotState.READY
                self.end_worker(slot, ExitReason.SHUT_DOWN, kill=not idle)
        self._note_gone()
        # The template kills what is left, so this only gives the idle ones time to say goodbye.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_gone.wait(), GOODBYE_S)
        await self._launcher.shut_down(timeout_s)
        for slot in self.slots:
            if slot.process is not None:
                await slot.process.bury()

    # --- beginnings

    def _launch(self, slot: Slot) -> None:
        slot.backoff_timer = None
        if slot.state is not SlotState.STARTING:
            slot.move(SlotState.STARTING)
        slot.begin_worker()
        self._launcher.launch(slot.index, slot.generation)

    def on_launched(self, launched: wire.Launched, descriptors: list[int]) -> None:
        if len(descriptors) != 3:
            raise PoolBrokenError("the front has no descriptors left (see `ulimit -n`)")
        slot = self.slots[launched.slot]
        channel_fd, output_fd, pidfd = descriptors
        slot.process = WorkerProcess(
            launched, channel_fd, output_fd, pidfd, self._max_payload_bytes, self._events
        )
        self._background.run(slot.process.connect())
        if self._stopping:
            self.end_worker(slot, ExitReason.SHUT_DOWN)

    def on_launch_failed(self, failed: wire.LaunchFailed) -> None:
        slot = self.slots[failed.slot]
        logger.error("No worker could be made for slot %d: %s", slot.index, failed.message)
        slot.move(SlotState.STOPPING)
        slot.exit_reason = ExitReason.DIED
        self._refill(slot, useful=False)

    def worker_is_ready(self, slot: Slot, ready: wire.Ready) -> None:
        """Take the first message of a worker that ran @init."""
        if slot.state is not SlotState.STARTING:
            return
        missing = self._functions - set(ready.functions)
        if missing:
            why = (
                f"the source did not register {', '.join(sorted(missing))} when a worker imported "
                'it again; is @expose under `if __name__ == "__main__"`?'
            )
            self.init_has_failed(slot, wire.InitFailed("ImportError", why, why))
            return
        logger.info("Worker %d is ready (init took %.2f s)", slot.index, ready.init_s)
        self._metrics.on_init(ready.init_s)
        if slot.started_at is not None:
            took = datetime.now(timezone.utc) - slot.started_at
            self._estimate.note_init(took.total_seconds())
        slot.move(SlotState.READY)
        if not self.first_ready.is_set():
            self.first_ready.set()
            for other in self.slots[1:]:
                self._launch(other)
        self._events.on_ready(slot)

    def init_has_failed(self, slot: Slot, failed: wire.InitFailed) -> None:
        """Take the first message of a worker that could not start."""
        logger.error("Init failed in worker %d:\n%s", slot.index, failed.traceback.rstrip())
        if slot.state is SlotState.STARTING:
            self.end_worker(slot, ExitReason.INIT_FAILED)

    # --- ends

    def end_worker(self, slot: Slot, reason: ExitReason, *, kill: bool = True) -> None:
        """Kill a worker, or dismiss an idle one; its slot is stopping until it is gone."""
        if slot.state is SlotState.STOPPING:
            return
        slot.exit_reason = reason
        slot.move(SlotState.STOPPING)
        if slot.process is not None:
            if kill:
                slot.process.kill()
            else:
                slot.process.dismiss()
            self.call_later(GONE_LIMIT_S, self._say_not_gone, slot.process)

    def _say_not_gone(self, process: WorkerProcess) -> None:
        slot = self.slot_of(process)
        if slot is not None:
            logger.error(
                "Worker %d (pid %d) is not gone after %.0f s: it, or a process that it started, "
                "hangs in the kernel or belongs to another user; its slot stays empty until then",
                slot.index,
                process.pid,
                GONE_LIMIT_S,
            )

    def channel_is_broken(self, process: WorkerProcess, error: WireError) -> None:
        """Kill a worker that does not speak the protocol any more."""
        slot = self.slot_of(process)
        if slot is not None and slot.state is not SlotState.STOPPING:
            logger.error("Worker %d broke its channel (%s); killing it", slot.index, error)
            self.end_worker(slot, ExitReason.BROKEN_CHANNEL)

    def channel_is_closed(self, process: WorkerProcess) -> None:
        """Wait for Gone, which is on its way if the worker is dying; otherwise kill it."""
        slot = self.slot_of(process)
        if slot is not None and slot.state is not SlotState.STOPPING:
            self.call_later(CHANNEL_GRACE_S, self._kill_unreachable, process)

    def _kill_unreachable(self, process: WorkerProcess) -> None:
        slot = self.slot_of(process)
        if slot is not None and slot.state is not SlotState.STOPPING:
            logger.error("Worker %d closed its channel; killing it", slot.index)
            self.end_worker(slot, ExitReason.BROKEN_CHANNEL)

    def on_gone(self, gone: wire.Gone) -> None:
        self._background.run(self._bury(self.slots[gone.slot], gone))

    async def _bury(self, slot: Slot, gone: wire.Gone) -> None:
        process = slot.process
        assert process is not None
        await process.bury()
        self.end_worker(slot, ExitReason.DIED)
        reason = slot.exit_reason or ExitReason.DIED
        slot.last_exit = Exit(reason, signal=gone.signal, exit_code=gone.exit_code)
        slot.process = None
        if reason is not ExitReason.SHUT_DOWN:
            how = describe_end(gone)
            logger.warning("Worker %d (pid %d) %s", slot.index, process.pid, how)
        had_entered = slot.task is not None and not process.orders_unread
        cut_short = reason in (ExitReason.TIMED_OUT, ExitReason.CANCELLED)
        useful = slot.tasks_done > 0 or had_entered or cut_short
        self._events.on_lost(slot, process, gone)
        self._refill(slot, useful=useful)
        self._note_gone()

    def _refill(self, slot: Slot, *, useful: bool) -> None:
        if self._stopping:
            return
        self._metrics.on_restart((slot.exit_reason or ExitReason.DIED).value)
        if not self.first_ready.is_set():
            how = slot.last_exit.reason if slot.last_exit else ExitReason.DIED
            why = "its @init failed" if how is ExitReason.INIT_FAILED else "it died"
            self._stopping = True
            error = FirstInitError(f"the first worker did not become ready: {why}")
            self._events.on_fatal(error)
        elif useful:
            slot.failures = 0
            self._launch(slot)
        else:
            slot.failures += 1
            wait_s = RESTART_BACKOFF.wait_s(slot.failures)
            logger.warning("Slot %d: next try in %.1f s", slot.index, wait_s)
            slot.move(SlotState.BACKING_OFF)
            slot.backoff_timer = self.call_later(wait_s, self._launch, slot)

    def on_template_lost(self) -> None:
        self._stopping = True
        why = "the template process is gone, and its workers with it"
        self._events.on_fatal(PoolBrokenError(why))

    def on_defect(self, error: BaseException) -> None:
        """End the service: something is wrong with this package itself."""
        self._events.on_fatal(PoolBrokenError(f"the pool has a defect: {error!r}"))

    def _note_gone(self) -> None:
        if all(slot.process is None for slot in self.slots):
            self._all_gone.set()
        else:
            self._all_gone.clear()
