"""Forgets tasks that are over: what ended long ago, and the oldest beyond a number and a size.

When the disk has taken nothing for a minute it forgets half of them at a time: what comes is worth
more than what was.

Runs in the front; the deletions are the journal's thread's, a few at a time, with commits between.
"""

from __future__ import annotations

import asyncio
import time

from ..ending import end_all
from ..errors import JournalError
from ..logger import logger
from .batch import Forgotten, Kept
from .commits import GroupCommit
from .database import PRUNE_AT_ONCE, Database
from .names import Names

_CROWD_EVERY_S = 5.0  # how often to look whether there are too many, while tasks end
_AGE_EVERY_S = 60.0
_PATIENCE_S = 60.0


# With 1 kB a task, 100,000 take 100 MB of disk beside their results.
DISK_LIMITS = Kept(tasks=100_000, result_bytes=1024**3)
MEMORY_LIMITS = Kept(tasks=10_000, result_bytes=256 * 1024**2)


class Pruner:
    """Keeps the journal within its limits."""

    def __init__(self, commits: GroupCommit, names: Names, limits: Kept, task_ttl_s: float) -> None:
        self._names = names
        self._commits = commits
        self._limits = limits
        self._task_ttl_s = task_ttl_s
        self._ended = 0
        self._well_s = time.monotonic()  # when the disk was last known to be well
        self._work: asyncio.Task[None] | None = None

    def note_end(self) -> None:
        """Take notice that one more task is over."""
        self._ended += 1

    def start(self) -> None:
        """Begin to prune, now and then."""
        self._work = asyncio.get_running_loop().create_task(self._prune_for_ever())

    async def stop(self) -> None:
        """Prune no more."""
        if self._work is not None:
            await end_all([self._work])

    @property
    def _is_stuck(self) -> bool:
        return time.monotonic() - self._well_s > _PATIENCE_S

    async def _prune_for_ever(self) -> None:
        next_age_s = 0.0
        while True:
            now_s = time.monotonic()
            if self._commits.trouble is None:
                self._well_s = now_s
            if self._ended or now_s >= next_age_s or self._is_stuck:
                next_age_s = now_s + _AGE_EVERY_S
                self._ended = 0
                try:
                    await self._prune()
                except JournalError:
                    pass  # a journal that cannot be read or written says so itself: another time
                except Exception:  # noqa: BLE001 - told; nothing depends on this one time
                    logger.exception("Old tasks could not be forgotten: a defect")
            await asyncio.sleep(_CROWD_EVERY_S)

    async def _prune(self) -> None:
        kept = await self._commits.read(Database.kept)
        tasks, result_bytes, most = kept.tasks, kept.result_bytes, self._limits.tasks
        if self._is_stuck and tasks:
            most = tasks // 2
            self._well_s = time.monotonic()  # see in a minute whether it helped
            logger.warning("Forgetting %d finished tasks, to make room on the disk", tasks - most)
        while True:
            excess = Kept(tasks - most, result_bytes - self._limits.result_bytes)
            pruned = await self._forget(excess, time.time() - self._task_ttl_s)
            for task in pruned:
                self._names.forget(task.function, task.address, task.number)
            tasks -= len(pruned)
            result_bytes -= sum(task.result_bytes for task in pruned)
            if len(pruned) < PRUNE_AT_ONCE:
                return

    async def _forget(self, excess: Kept, finished_before: float) -> list[Forgotten]:
        return await self._commits.read(lambda database: database.prune(excess, finished_before))
