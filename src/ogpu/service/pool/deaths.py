"""The ends of workers: killed, with or without a last word; buried, when nothing is left of them.

Runs in the front, on its event loop. Who takes their place is the business of ``lives.py``.

1. A worker is to end: its slot is stopping. At a deadline or a cancel it is asked for the stacks of
   its threads first, for a tenth of a second at most; then it is killed. It may also end by itself.
2. The template says Gone, when nothing of it is left. Its last output is read, and its slot is
   empty.
3. It is not gone after GONE_LIMIT_S: it hangs in the kernel, or belongs to another user. The slot
   is unkillable until it is, and readiness says so.
4. The template has died, and the kernel kills its workers (PR_SET_PDEATHSIG), which then are
   children of the front: it buries them itself.
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

OnStacks = Callable[[str | None], None]


class DeathEvents(Protocol):
    """Who fills the slots again."""

    def on_buried(self, slot: Slot, process: WorkerProcess, gone: wire.Gone) -> None:
        """Take notice that nothing is left of a worker."""

    def on_unkillable(self, slot: Slot) -> None:
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

    def _call_later(
        self, delay_s: float, function: Callable[[WorkerProcess], None], process: WorkerProcess
    ) -> None:
        self._loop.call_later(delay_s, self._background.guard, function, process)

    def slot_of(self, process: WorkerProcess) -> Slot | None:
        """Return the slot that a worker fills, or None: it has been buried, this is late news."""
        slot = self._slots[process.slot]
        return slot if slot.process is process else None

    def end_worker(self, slot: Slot, reason: ExitReason, then: OnStacks | None = None) -> None:
        """Kill a worker; its slot is stopping until it is gone.

        ``then`` is called with its stacks (None: it could not tell), before the worker is gone.
        """
        process = self._stop_slot(slot, reason)
        if process is None:
            return
        if then is None:
            process.kill()
        else:
            process.settled.clear()
            self._background.run(self._kill_with_stacks(process, then))

    def dismiss(self, slot: Slot, reason: ExitReason) -> None:
        """Let an idle worker leave by itself."""
        process = self._stop_slot(slot, reason)
        if process is not None:
            process.dismiss()

    def _stop_slot(self, slot: Slot, reason: ExitReason) -> WorkerProcess | None:
        """Return the worker that is to end, or None where it is ending already."""
        if slot.state in (SlotState.STOPPING, SlotState.UNKILLABLE):
            return None
        assert slot.process is not None
        slot.exit_reason = reason
        slot.move(SlotState.STOPPING)
        self._call_later(GONE_LIMIT_S, self._on_not_gone, slot.process)
        return slot.process

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
        self._events.on_unkillable(slot)

    # --- the channel ends

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
            self._call_later(CHANNEL_GRACE_S, self._kill_unreachable, process)

    def _kill_unreachable(self, process: WorkerProcess) -> None:
        slot = self.slot_of(process)
        if slot is not None and slot.state is not SlotState.STOPPING:
            logger.error("Worker %d closed its channel; killing it", slot.index)
            self.end_worker(slot, ExitReason.BROKEN_CHANNEL)

    # --- gone

    def on_gone(self, gone: wire.Gone) -> None:
        """Bury a worker: it has been reaped, with all that it left."""
        slot = self._slots[gone.slot]
        assert slot.process is not None
        slot.process.is_gone = True
        self._background.run(self._bury(slot, gone))

    async def _bury(self, slot: Slot, gone: wire.Gone) -> None:
        process = slot.process
        assert process is not None
        await process.settled.wait()
        await process.bury()
        if slot.state not in (SlotState.STOPPING, SlotState.UNKILLABLE):
            slot.exit_reason = ExitReason.DIED
            slot.move(SlotState.STOPPING)
        process.memory = self._explain(slot, gone)
        if process.memory.out_of_memory:
            slot.exit_reason = ExitReason.OUT_OF_MEMORY
        reason = slot.exit_reason or ExitReason.DIED
        if gone.signal == wire.DUMP_SIGNAL:
            gone = replace(gone, signal=int(signal.SIGKILL))  # the first half of our kill
        slot.last_exit = Exit(reason, gone.signal, gone.exit_code)
        slot.process = None
        if reason is not ExitReason.SHUT_DOWN:
            logger.warning(
                "Worker %d (pid %d) %s (%s)",
                slot.index,
                process.pid,
                describe_end(gone, process.memory),
                reason.value,
            )
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

    async def bury_without_template(self) -> None:
        """Kill, reap and bury the workers of a template that has died."""
        filled = [s for s in self._slots if s.process is not None and not s.process.is_gone]
        workers = [slot.process for slot in filled if slot.process is not None]
        for slot in filled:
            self.end_worker(slot, ExitReason.TEMPLATE_DIED)
        await self._launcher.end_template()
        pids = {process.pid for process in workers}
        for process in workers:
            process.is_gone = True  # as good as: if the next template dies now, too, once is enough
            self._background.run(self._collect(process, pids))

    async def _collect(self, process: WorkerProcess, pids: set[int]) -> None:
        await process.wait_end()
        code = reap(process.pid)
        pids.discard(process.pid)
        if await self._launcher.kill_orphans(but=pids):
            slot = self._slots[process.slot]
            self.on_gone(wire.Gone.with_code(process.slot, slot.generation, code))

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
