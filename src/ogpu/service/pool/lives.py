"""The lives of workers: launched, ready, at work, and who takes their place.

Runs in the front, on its event loop. It fills the slots; ``deaths.py`` empties them, and
``setbacks.py`` says when it is enough. What becomes of the task of a worker that ends is the
supervisor's business (``LifeEvents``).

1. Slot 0 is launched alone: its @init may download. When it is ready, the others are launched.
2. A worker that is well is to be replaced (``recycle``): between two tasks, and one slot at a time
   where it can go on that long.
   When all slots are filled, a standby is ordered: the next worker then costs its @init, and not
   the import of the source where workers are spawned. Where they are forked, it saves the fork, and
   is ordered when a worker has been replaced for the first time.
3. A worker is gone: its slot is filled again, at once where it had been of use, else after a
   back-off; not before the memory of its GPU is back (``reclaim.py``). One that never became ready,
   or whose device does not answer any more, is a setback.
4. The template is gone, and its workers with it: another one is made (``renewal.py``), and every
   slot is filled again. One that leads to no worker is a setback, too; and where @prepare ended it
   before any worker was ever ready, the start has failed.
"""

from __future__ import annotations

import asyncio
import os
import random
from datetime import datetime, timezone
from typing import Protocol

from .. import wire
from ..config import Settings
from ..errors import PoolBrokenError
from ..handler import get_prepare_handler
from ..logger import logger
from ..metrics import Metrics
from .background import Background
from .deaths import Deaths
from .estimate import Estimate
from .evidence import describe_end
from .places import Places
from .process import WorkerEvents, WorkerProcess
from .reclaim import Reclaim
from .renewal import Renewal
from .setbacks import OnBroken, Setbacks
from .slot import CAN_WAIT, ExitReason, Slot, SlotState

# A worker that ends sooner than this, with no task, has been of no use.
_LEAST_LIFE_S = 1.0
# After a worker is ready, its first task comes first: where there are few cores it would wait for
# the fork or the import of a standby.
_STANDBY_PAUSE_S = 0.1
# Beside the result itself a Done frame carries nothing; a Failed frame has an empty payload.
_PAYLOAD_SLACK_BYTES = 1024
# Slots that nothing is expected of soon: while another one is being filled, none is emptied.
_AT_WORK = (SlotState.READY, SlotState.BUSY)
_IN_PLACE = (SlotState.READY, SlotState.BUSY, SlotState.UNKILLABLE)


class LifeEvents(WorkerEvents, OnBroken, Protocol):
    """Who has work for the workers."""

    def on_ready(self, slot: Slot) -> None:
        """Take notice that a worker takes tasks."""

    def on_lost(self, slot: Slot, process: WorkerProcess, gone: wire.Gone) -> None:
        """Settle the task of a worker that is gone, if it had one."""


class Lives:
    """Fills the slots, and fills them again."""

    def __init__(
        self,
        settings: Settings,
        functions: set[str],
        places: Places,
        events: LifeEvents,
        background: Background,
        meters: tuple[Metrics, Estimate],
    ) -> None:
        self.slots = [
            Slot(index, device=None if plan.device is None else str(plan.device))
            for index, plan in enumerate(places.devices.plans)
        ]
        self._settings = settings
        self._functions = functions
        self._launcher, self._scratch, self._devices = places
        self._reclaim = Reclaim(places.devices)
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._background = background
        self.guard = background.guard
        self._metrics, self._estimate = meters
        self._deaths = Deaths(self.slots, self._launcher, background, self)
        self.end_worker = self._deaths.end_worker
        self.channel_is_broken = self._deaths.channel_is_broken
        self.channel_is_closed = self._deaths.channel_is_closed
        self.worker_has_ended = self._deaths.worker_has_ended
        self.on_gone = self._deaths.on_gone
        self.slot_of = self._deaths.slot_of
        self._setbacks = Setbacks(self.slots, settings, background, self._fill, events)
        self.first_ready = self._setbacks.first_ready
        self.spend_budget = self._setbacks.spend_budget
        self._renewal = Renewal(self.slots, self._launcher, self._deaths, background, self)

    @property
    def is_stopping(self) -> bool:
        """True when nothing is to be launched any more."""
        return self._setbacks.is_stopping

    def begin(self) -> None:
        """Take over slot 0, whose launch was ordered before the event loop ran."""
        self._begin_worker(self.slots[0])
        self._launcher.listen(self)
        self._background.run(self._launcher.watch())
        self._background.run(self._launcher.memory.watch())
        self._background.run(self._setbacks.watch_devices(self._devices))

    async def stop(self, timeout_s: float) -> None:
        """End every worker and the template: the idle ones by themselves, the rest killed."""
        self._setbacks.is_stopping = True
        for slot in self.slots:
            slot.cancel_timers()
            if slot.process is None:
                continue
            if slot.state is SlotState.READY:
                self._deaths.dismiss(slot, ExitReason.SHUT_DOWN)
            else:
                self.end_worker(slot, ExitReason.SHUT_DOWN)
        # The template kills what is left, so this only gives the idle ones time to say goodbye.
        await self._deaths.wait_all_gone()
        await self._launcher.shut_down(timeout_s)
        left = [slot.process.bury() for slot in self.slots if slot.process is not None]
        await asyncio.gather(*left)

    # --- beginnings

    def _fill(self, slot: Slot) -> None:
        """Launch a worker in the place of one that is gone, when its device is free again."""
        if self._reclaim.can_wait(slot.index):
            self._background.run(self._launch_when_free(slot))
        else:
            self._launch(slot)

    async def _launch_when_free(self, slot: Slot) -> None:
        await self._reclaim.memory_back(slot.index)
        if not self.is_stopping:
            self._launch(slot)

    def _launch(self, slot: Slot) -> None:
        slot.cancel_timers()
        if slot.state is not SlotState.STARTING:
            slot.move(SlotState.STARTING)
        self._begin_worker(slot)
        temp_dir = self._scratch.make(slot.index, slot.generation)
        self._reclaim.note_launch(slot.index)
        environment = self._devices.plans[slot.index].environment
        self._launcher.launch(slot.index, slot.generation, temp_dir, environment)

    def _begin_worker(self, slot: Slot) -> None:
        slot.begin_worker()
        most = self._settings.max_tasks_per_worker
        if most is not None:  # workers that began together are not to be replaced together
            jitter = random.uniform(0.9, 1.1)  # noqa: S311 - not a secret
            slot.max_tasks = max(1, round(most * jitter))

    def on_launched(self, launched: wire.Launched, descriptors: list[int]) -> None:
        if len(descriptors) != 4:
            for descriptor in descriptors:
                os.close(descriptor)
            raise PoolBrokenError("the front has no descriptors left (see `ulimit -n`)")
        slot = self.slots[launched.slot]
        if launched.was_standby:
            self._scratch.take_from_standby(launched.slot, launched.generation)
        slot.started_at = datetime.now(timezone.utc)  # the template may have had to prepare first
        most = self._settings.max_result_bytes + _PAYLOAD_SLACK_BYTES
        try:
            slot.process = WorkerProcess(launched, slot.device, descriptors, most, self._events)
        except OSError as error:
            raise PoolBrokenError(f"a worker cannot be talked to: {error}") from error
        self._background.run(slot.process.connect())
        if self.is_stopping:
            self.end_worker(slot, ExitReason.SHUT_DOWN)
        elif self._settings.init_timeout is not None:
            slot.timer = self._background.call_later(
                self._settings.init_timeout, self._on_init_timeout, slot
            )

    def on_launch_failed(self, failed: wire.LaunchFailed) -> None:
        slot = self.slots[failed.slot]
        logger.error("No worker could be made for slot %d: %s", slot.index, failed.message)
        slot.move(SlotState.STOPPING)
        slot.exit_reason = ExitReason.DIED
        self._clean(slot)
        if any(other.state in _AT_WORK for other in self.slots):
            # A task may have taken all the processes or the memory there are. It has a deadline.
            self._setbacks.back_off(slot)
        else:
            self._setbacks.after_failed_start(slot, f"no worker could be made: {failed.message}")

    def worker_is_ready(self, slot: Slot, ready: wire.Ready) -> None:
        """Take the first message of a worker that ran @init."""
        if slot.state is not SlotState.STARTING:
            return
        why_not = self._why_useless(ready)
        if why_not is not None:
            self.init_has_failed(slot, wire.InitFailed("ImportError", why_not, why_not))
            return
        slot.cancel_timers()
        logger.info("Worker %d is ready (init took %.2f s)", slot.index, ready.init_s)
        self._metrics.on_init(ready.init_s)
        if slot.started_at is not None:
            took = datetime.now(timezone.utc) - slot.started_at
            # The first one began before the event loop did.
            self._estimate.note_init(max(took.total_seconds(), ready.init_s))
        assert slot.process is not None
        slot.process.share_ahead()
        slot.move(SlotState.READY)
        slot.ready_s = self._loop.time()
        self._renewal.note_ready()
        if not self.first_ready.is_set():
            self.first_ready.set()
            for other in self.slots[1:]:
                self._launch(other)
        self._events.on_ready(slot)
        for other in self.slots:
            if other.state is SlotState.READY:
                self.recycle_if_wanted(other)
        # Once for each worker that was made, so that one which cannot wait is not made again and
        # again.
        if self._settings.standby:
            self._background.call_later(_STANDBY_PAUSE_S, self._order_standby)

    def _order_standby(self) -> None:
        # Not sooner: its import would delay the @init of those that are needed.
        are_filled = all(slot.state in _IN_PLACE for slot in self.slots)
        if self.is_stopping or not are_filled or not self._launcher.may_have_standby:
            return
        # Whose place it will take is not known. But it is to see one GPU as any worker does, and
        # none where there is to be none, when it imports the source.
        environment = self._devices.plans[0].environment
        imports = self._launcher.method == "spawn"
        if not imports and all(slot.generation == 1 for slot in self.slots):
            return  # a service whose workers never end has no use for it, and saves its memory
        temp_dir = self._scratch.make_for_standby() if imports else None
        self._launcher.order_standby(temp_dir, environment)

    def _why_useless(self, ready: wire.Ready) -> str | None:
        if ready.protocol_version != wire.PROTOCOL_VERSION:
            return (
                f"the worker speaks protocol {ready.protocol_version}, the service "
                f"{wire.PROTOCOL_VERSION}: was the package replaced? Restart the service"
            )
        missing = self._functions - set(ready.functions)
        if missing:
            return (
                f"the source did not register {', '.join(sorted(missing))} when a worker imported "
                'it again; is @expose under `if __name__ == "__main__"`?'
            )
        return None

    def init_has_failed(self, slot: Slot, failed: wire.InitFailed) -> None:
        """Take the first message of a worker that could not start."""
        if slot.state is SlotState.STARTING:
            logger.error("Init failed in worker %d:\n%s", slot.index, failed.traceback.rstrip())
            slot.last_failure = f"its @init failed:\n{failed.traceback.rstrip()}"
            self.end_worker(slot, ExitReason.INIT_FAILED)

    def _on_init_timeout(self, slot: Slot) -> None:
        def note(stack: str | None) -> None:
            limit_s = self._settings.init_timeout
            doing = f"; it was here:\n{stack}" if stack else ""
            slot.last_failure = (
                f"its @init took longer than {limit_s:g} s (OGPU_INIT_TIMEOUT){doing}"
            )
            logger.error("Worker %d: %s", slot.index, slot.last_failure)

        if slot.state is SlotState.STARTING:
            self.end_worker(slot, ExitReason.INIT_TIMED_OUT, then=note)

    # --- recycling

    def recycle_if_wanted(self, slot: Slot) -> bool:
        """Replace the worker of a slot between two tasks, where that is wanted and can be now."""
        if (
            slot.recycle is None
            and slot.max_tasks is not None
            and slot.tasks_done >= slot.max_tasks
        ):
            slot.recycle = ExitReason.MAX_TASKS
        if slot.recycle is None or self.is_stopping:
            return False
        others = (other.state for other in self.slots if other is not slot)
        if slot.recycle in CAN_WAIT and not all(state in _IN_PLACE for state in others):
            return False
        logger.info("Worker %d is recycled (%s)", slot.index, slot.recycle.value)
        self.end_worker(slot, slot.recycle)
        return True

    # --- replacements

    def on_buried(self, slot: Slot, process: WorkerProcess, gone: wire.Gone) -> None:
        self._clean(slot)
        had_task = bool(slot.tasks) and not process.orders_unread
        self._events.on_lost(slot, process, gone)
        if self.is_stopping:
            return
        self._metrics.on_restart((slot.exit_reason or ExitReason.DIED).value)
        if slot.exit_reason is ExitReason.TEMPLATE_DIED:
            self._fill(slot)
        elif slot.exit_reason is ExitReason.DEVICE_LOST:
            self._setbacks.after_failed_start(slot, "its device does not answer, or is gone")
        elif slot.ready_s is None:
            self._setbacks.after_failed_start(slot, slot.last_failure or _told(slot, process, gone))
        elif had_task or slot.was_useful(self._loop.time(), _LEAST_LIFE_S):
            slot.failures = 0
            self._fill(slot)
        else:
            self._setbacks.back_off(slot)

    def _clean(self, slot: Slot) -> None:
        """Remove the temporary files of the worker that is gone."""
        self._background.run(self._remove_scratch(slot.index, slot.generation))

    async def _remove_scratch(self, slot: int, generation: int) -> None:
        try:
            await asyncio.to_thread(self._scratch.remove, slot, generation)
        except RuntimeError as error:  # no thread can be started; the end of the service removes it
            logger.warning("The temporary files of worker %d stay for now: %s", slot, error)

    def on_unkillable(self, slot: Slot, process: WorkerProcess) -> None:
        self._events.on_lost(slot, process, wire.Gone(slot.index, slot.generation, None, None))
        self._setbacks.note_unkillable()

    # --- another template (RenewalEvents)

    def on_template_lost(self) -> None:
        if self.is_stopping:
            return
        prepares = not self._launcher.is_ready and get_prepare_handler() is not None
        if prepares and not self.first_ready.is_set():
            self._background.run(self._fail_preparation())
        else:
            self._renewal.begin()

    async def _fail_preparation(self) -> None:
        """End the service: @prepare has ended its template, and nothing has ever worked."""
        await self._launcher.end_template()
        self._setbacks.fail_start(self._launcher.why_unready or "@prepare ended its template")

    def launch_again(self, slot: Slot) -> None:
        if not self.is_stopping:
            self._clean(slot)
            self._launch(slot)


def _told(slot: Slot, process: WorkerProcess, gone: wire.Gone) -> str:
    """Log and return how a worker ended that never became ready, and did not say why."""
    texts = (process.stacks(), process.output.tail())
    how = f"it {describe_end(gone, process.memory)} in @init"
    what = "\n".join([how, *(text for text in texts if text)])
    logger.error("Worker %d: %s", slot.index, what)
    return what
