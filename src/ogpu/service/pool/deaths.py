"""The ends of workers: killed, with or without a last word; buried, when nothing is left of them.

Runs in the front, on its event loop. Who takes their place is the business of ``lives.py``.

1. A worker is to end: its slot is stopping. At a deadline or a cancel it is asked for the stacks of
   its threads first, for a tenth of a second at most; then it is killed. It may also end by itself.
2. The template says Gone, when nothing of it is left. Its last output is read, and its slot is
   empty.
3. It is not gone after GONE_LIMIT_S: it hangs in the kernel, or belongs to another user. The slot
   is unkillable until it is, and readiness says so.
4. The template has died, and the kernel kills its workers (PR_SET_PDEATHSIG), which then are
   children of the front, as what they leave: it kills, reaps and buries them itself. What it cannot
   kill keeps one of them from being buried, so that a slot is lost to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from .. import wire
from ..errors import WireError
from ..logger import logger
from .background import Background
from .evidence import describe_end
from .launcher import Launcher
from .memory import NOT_ASKED, MemoryEvidence
from .pidfd import reap
from .process import WorkerProcess
from .slot import Exit, ExitReason, Slot, SlotState

# A process closes its descriptors shortly before it is dead (GPU drivers take their time there);
# one that closed its channel and is still there after this was not dying, and is of no use.
CHANNEL_GRACE_S = 1.0
GOODBYE_S = 1.0
GONE_LIMIT_S = 5.0
_LOOK_AGAIN_S = 0.005
_LOOK_LATER_S = 0.25
_ENDING = (SlotState.STOPPING, SlotState.UNKILLABLE)

OnStacks = Callable[[str | None], None]


class DeathEvents(Protocol):
    """Who fills the slots again."""

    def on_buried(self, slot: Slot, process: WorkerProcess, gone: wire.Gone) -> None:
        """Take notice that nothing is left of a worker."""

    def on_unkillable(self, slot: Slot, process: WorkerProcess) -> None:
        """Take notice that a slot is lost, for now."""


class Deaths:
    """Ends workers, and buries them."""

    def __init__(
        self, slots: list[Slot], launcher: Launcher, background: Background, events: DeathEvents
    ) -> None:
        self._slots = slots
        self._launcher = launcher
        self._background = background
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._all_gone = asyncio.Event()

    def slot_of(self, process: WorkerProcess) -> Slot | None:
        """Return the slot that a worker fills, or None: it has been buried, this is late news."""
        slot = self._slots[process.slot]
        return slot if slot.process is process else None

    def _living(self, process: WorkerProcess) -> Slot | None:
        """Return the slot of a worker that is not ending yet."""
        slot = self.slot_of(process)
        return None if slot is None or slot.state in _ENDING else slot

    def end_worker(self, slot: Slot, reason: ExitReason, then: OnStacks | None = None) -> None:
        """Kill a worker that is not ending yet; its slot is stopping until it is gone.

        ``then`` is called with its stacks (None: it could not tell), before it is buried.
        """
        process = slot.process
        assert process is not None
        if slot.state in _ENDING:
            return
        self._stop_slot(slot, process, reason)
        if then is None:
            process.kill()
        else:
            process.settled.clear()
            self._background.run(self._kill_with_stacks(process, then))

    def dismiss(self, slot: Slot, reason: ExitReason) -> None:
        """Let an idle worker leave by itself."""
        assert slot.process is not None
        self._stop_slot(slot, slot.process, reason)
        slot.process.dismiss()

    def _stop_slot(self, slot: Slot, process: WorkerProcess, reason: ExitReason) -> None:
        slot.exit_reason = reason
        slot.cancel_timers()
        slot.move(SlotState.STOPPING)
        self._background.call_later(GONE_LIMIT_S, self._on_not_gone, process)

    async def _kill_with_stacks(self, process: WorkerProcess, then: OnStacks) -> None:
        try:
            then(await process.kill_with_stacks())
        finally:
            process.settled.set()

    def _on_not_gone(self, process: WorkerProcess) -> None:
        slot = self.slot_of(process)
        if slot is None:
            return
        logger.error(
            "Worker %d (pid %d) is not gone %.0f s after SIGKILL: it, or a process that it "
            "started, hangs in the kernel or belongs to another user; its slot is lost until "
            "that has ended",
            slot.index,
            process.pid,
            GONE_LIMIT_S,
        )
        slot.move(SlotState.UNKILLABLE)
        self._events.on_unkillable(slot, process)

    # --- it ends by itself, or its channel does

    def worker_has_ended(self, process: WorkerProcess) -> None:
        """Take notice that the process is dead. Something that it started may not be, for now."""
        self._background.run(self._hear_out(process))

    async def _hear_out(self, process: WorkerProcess) -> None:
        await process.heard_out(CHANNEL_GRACE_S)
        slot = self._living(process)
        if slot is not None:
            self._stop_slot(slot, process, ExitReason.DIED)

    def channel_is_broken(self, process: WorkerProcess, error: WireError) -> None:
        """Kill a worker that does not speak the protocol any more."""
        slot = self._living(process)
        if slot is not None:
            logger.error("Worker %d broke its channel (%s); killing it", slot.index, error)
            self.end_worker(slot, ExitReason.BROKEN_CHANNEL)

    def channel_is_closed(self, process: WorkerProcess) -> None:
        """Wait for its end, which is near if the worker is dying; otherwise kill it."""
        if self._living(process) is not None:
            self._background.call_later(CHANNEL_GRACE_S, self._kill_unreachable, process)

    def _kill_unreachable(self, process: WorkerProcess) -> None:
        slot = self._living(process)
        if slot is not None and not process.has_ended:
            logger.error("Worker %d closed its channel; killing it", slot.index)
            self.end_worker(slot, ExitReason.BROKEN_CHANNEL)

    # --- gone

    def on_gone(self, gone: wire.Gone) -> None:
        """Bury a worker: it has been reaped, with all that it left."""
        slot = self._slots[gone.slot]
        if slot.process is None or slot.generation != gone.generation:
            logger.error("Late news of a worker that is gone already: %s", gone)
            return
        slot.process.is_gone = True
        self._background.run(self._bury(slot, slot.process, gone))

    async def _bury(self, slot: Slot, process: WorkerProcess, gone: wire.Gone) -> None:
        await process.bury()
        await process.settled.wait()  # its task ends before its slot is filled again
        if slot.state not in _ENDING:
            self._stop_slot(slot, process, ExitReason.DIED)
        process.memory = self._explain(slot, gone)
        if process.memory.out_of_memory:
            slot.exit_reason = ExitReason.OUT_OF_MEMORY
        elif slot.exit_reason is ExitReason.BROKEN_CHANNEL and gone.signal != signal.SIGKILL:
            slot.exit_reason = ExitReason.DIED  # it was dying already when it was killed for that
        reason = slot.exit_reason or ExitReason.DIED
        if gone.signal == wire.DUMP_SIGNAL:
            gone = replace(gone, signal=int(signal.SIGKILL))  # the first half of our kill
        slot.last_exit = Exit(reason, gone.signal, gone.exit_code)
        slot.process = None
        if reason is not ExitReason.SHUT_DOWN:
            how = describe_end(gone, process.memory)
            logger.warning("Worker %d (pid %d) %s (%s)", slot.index, process.pid, how, reason.value)
        self._events.on_buried(slot, process, gone)
        self._note_gone()

    def _explain(self, slot: Slot, gone: wire.Gone) -> MemoryEvidence:
        """Ask whether a worker ran out of memory, where that can be how it ended."""
        by_others = slot.exit_reason is ExitReason.DIED
        # Killed by us, but it may have been dying already, for longer than its channel's grace.
        unreachable = slot.exit_reason is ExitReason.BROKEN_CHANNEL
        if gone.signal != signal.SIGKILL or not (by_others or unreachable):
            return NOT_ASKED
        evidence = self._launcher.memory.explain_death()
        return evidence if by_others or evidence.out_of_memory else NOT_ASKED

    # --- the template is gone

    async def end_with_template(self) -> None:
        """Kill the workers of a template that has died; they are buried as they end."""
        filled = [s for s in self._slots if s.process is not None and not s.process.is_gone]
        workers = [slot.process for slot in filled if slot.process is not None]
        for slot, process in zip(filled, workers, strict=True):
            self.end_worker(slot, ExitReason.TEMPLATE_DIED)
            process.is_gone = True  # as good as: should the next template die now, too
        await self._launcher.end_template()
        self._background.run(self._collect(workers))

    async def _collect(self, workers: list[WorkerProcess]) -> None:
        """Reap and bury workers that have become ours, and kill what they leave.

        Whose an orphan is, nobody can tell. While some are left, none of these workers is buried,
        for a moment; then one of them is kept from it, until they have ended.
        """
        alive, dead = list(workers), []
        limit = self._loop.time() + GONE_LIMIT_S / 2
        while True:
            for process in [p for p in alive if p.has_ended]:
                alive.remove(process)
                dead.append((process, reap(process.pid)))
            orphans = self._launcher.kill_orphans(but={process.pid for process in alive})
            is_late = self._loop.time() > limit
            kept = 0 if not orphans else 1 if is_late else len(dead)
            for process, code in dead[kept:]:
                generation = process.reference.generation
                self.on_gone(wire.Gone.with_code(process.slot, generation, code))
            del dead[kept:]
            if not alive and not dead and not orphans:
                return
            await asyncio.sleep(_LOOK_LATER_S if is_late else _LOOK_AGAIN_S)

    # --- the end of the service

    async def wait_all_gone(self) -> None:
        """Wait until no worker is left, for a moment at most."""
        self._note_gone()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_gone.wait(), GOODBYE_S)

    def _note_gone(self) -> None:
        if all(slot.process is None for slot in self._slots):
            self._all_gone.set()
        else:
            self._all_gone.clear()
