"""Whether a worker is fit for another task after the one that it has just run.

Runs in a worker. What it finds is said in the answer (``recycle``), and the front replaces the
worker: at once, or, where the worker can go on for a while, when no other slot is being filled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from .. import wire
from ..context import recycle_wanted
from ..logger import logger
from .device import probe_after
from .interrupt import Interrupt
from .leftovers import Surroundings
from .memory import MemoryLimit


class Fitness:
    """Judges the worker after each task; ``begin`` notes what was there before it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop | None,
        interrupt: Interrupt,
        max_rss_bytes: int | None,
    ) -> None:
        self._loop = loop
        self._interrupt = interrupt
        self._memory = MemoryLimit(max_rss_bytes)
        self._before: Surroundings | None = None

    def begin(self, order: wire.Run) -> None:
        """Note what is there before a task that may be stopped."""
        self._before = None
        if order.may_be_asked:
            with contextlib.suppress(OSError):  # a source may have used up all descriptors
                self._before = Surroundings(self._loop)

    def judge(self, answers: Sequence[wire.Done | wire.Failed]) -> wire.RecycleReason | None:
        """Return why the worker is to be replaced now that its tasks are over, or None."""
        was_stopped = self._interrupt.was_raised
        failure = next((answer for answer in answers if isinstance(answer, wire.Failed)), None)
        if was_stopped or failure is not None:
            reason = probe_after(failure or answers[0], was_stopped=was_stopped)
            if reason is not None:
                return reason
        if was_stopped and self._left_something():
            return wire.RecycleReason.LEFTOVERS
        why = recycle_wanted()
        if why is not None:
            logger.info("This worker is to be replaced: %s", why)
            return wire.RecycleReason.RECYCLE_WORKER
        return wire.RecycleReason.MAX_RSS if self._memory.is_exceeded() else None

    def _left_something(self) -> bool:
        try:
            found = self._before.leftovers() if self._before else ["who knows what"]
        except OSError as error:
            found = [f"nobody can look ({error})"]
        if found:
            logger.warning("The task was stopped, but not all of it: %s", ", ".join(found))
        return bool(found)
