"""Waiting awake: the loop does not sleep while an answer, or a task, is expected at once.

Runs in the front, on its event loop; the dispatcher says what it waits for.

Waking a process that sleeps costs 20 to 60 µs on a virtual machine. A client that sends one small
task after the other pays for that twice a task: 190 µs, and 120 where the front is awake.

1. A worker has got its orders, or a task has ended and none is left. Where what comes next (the
   answer, the next task) came within AWAKE_S the last time, and a core is to spare, the loop has
   something to do in each turn from now on: it looks for events without sleeping, and serves all of
   them as ever.
2. It came, or AWAKE_S are over: the loop may sleep again.

So a handler that takes longer costs nothing, and one that is short now and long then AWAKE_S for
each of its tasks at most. In a crowd the loop has something to do anyway, and nobody asks for this.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable

from .slot import Slot, SlotState

AWAKE_S = 0.0002
_TASK = ""  # what is expected where it is no function's answer


class Awake:
    """Keeps the loop awake for moments. ``cores`` are those that this program may use.

    Example:
        >>> awake.note_run("handle", 0.00005)
        >>> awake.expect_answer("handle")
    """

    def __init__(
        self, slots: list[Slot], cores: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._slots = slots
        self._cores = cores
        self._clock = clock
        self._soon: set[str] = set()  # what came soon the last time
        self._idle_since_s = 0.0  # 0: there is a task
        self._until_s = 0.0
        self._is_looking = False
        self._loop = asyncio.get_running_loop()

    def has_core(self) -> bool:
        """Tell whether somebody may wait awake beside the workers that are busy."""
        return self._at_work() < self._cores

    def note_run(self, function: str, took_s: float) -> None:
        """Take a task's time into account."""
        self._note(function, took_s)

    def expect_answer(self, function: str) -> None:
        """Take notice that a task was given out, and no other waits."""
        self._expect(function, has_core=self.has_core())

    def expect_task(self) -> None:
        """Take notice that no task waits."""
        if not self._at_work():
            self._idle_since_s = self._clock()
            self._expect(_TASK, has_core=self._cores > 1)  # the client may be on this machine

    def note_task(self) -> None:
        """Take notice that a task has come."""
        if self._idle_since_s:
            self._note(_TASK, self._clock() - self._idle_since_s)
            self._idle_since_s = 0.0

    def _note(self, what: str, took_s: float) -> None:
        if took_s < AWAKE_S:
            self._soon.add(what)
        else:
            self._soon.discard(what)

    def _at_work(self) -> int:
        return len([slot for slot in self._slots if slot.state is SlotState.BUSY])

    def _expect(self, what: str, *, has_core: bool) -> None:
        if what not in self._soon or not has_core:
            self._until_s = 0.0
            return
        self._until_s = self._clock() + AWAKE_S
        if not self._is_looking:
            self._is_looking = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._is_looking = self._clock() < self._until_s
        if self._is_looking:
            os.sched_yield()  # to whoever else wants this core
            self._loop.call_soon(self._look)
