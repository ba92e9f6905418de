"""The queue: tasks that wait for a worker, first come, first served.

Runs in the front; the supervisor owns it. Inputs of tasks far back in the queue are in the journal
alone, so that 10,000 waiting tasks cost the memory of their names.

1. A task is queued with its input, in the lane of its function: a batch is taken from one of them.
   When its row is on the disk and the inputs in memory are more than MEMORY_BYTES, its input is
   dropped.
2. Whenever a task leaves and few inputs are left in memory at the head, the next ones are read.
3. A task at the head whose input is not there yet holds up those behind it: order wins. So does a
   batch: it is run as one, when all its inputs are there.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Protocol

from ..errors import JournalError
from ..journal import Journal
from ..logger import logger
from ..task import Task
from .background import Background

MEMORY_BYTES = 8 * 1024 * 1024
BATCH_BYTES = 64 * 1024 * 1024  # a batch with more has fewer tasks
_READ_TASKS = 64
_READ_AGAIN_S = 1.0  # after a read that failed


class QueueEvents(Protocol):
    """Who wants to know what becomes of those that wait."""

    def on_expired(self, task: Task) -> None:
        """Take a task that has waited too long, and is out of the queue."""

    def on_input_lost(self, task: Task) -> None:
        """Take a task whose input is not in the journal, and that is out of the queue."""

    def on_loaded(self) -> None:
        """Take notice that the task at the head may have got its input."""


class TaskQueue:
    """Tasks in the order in which they run; one may wait for ``timeout_s``, or for ever."""

    def __init__(
        self,
        journal: Journal,
        background: Background,
        timeout_s: float | None,
        events: QueueEvents,
    ) -> None:
        self._journal = journal
        self._background = background
        self._timeout_s = timeout_s
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[str, OrderedDict[int, Task]] = {}  # by function, then by number
        self._length = 0
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._loaded_bytes = 0
        self._unloaded = 0
        self._reading = False

    def __len__(self) -> int:
        return self._length

    def __contains__(self, task: Task) -> bool:
        return task.number in self._lanes.get(task.function, ())

    def __iter__(self) -> Iterator[Task]:
        return heapq.merge(*(lane.values() for lane in self._lanes.values()), key=_number_of)

    def heads(self) -> list[Task]:
        """Return the first task of each function, in the order in which they were accepted."""
        heads = [next(iter(lane.values())) for lane in self._lanes.values() if lane]
        if len(heads) > 1:
            heads.sort(key=_number_of)
        return heads

    def first_of(self, function: str, most: int) -> list[Task]:
        """Return the first tasks of a function, in order."""
        return list(islice(self._lanes[function].values(), most))

    def now_s(self) -> float:
        """Return the time of the clock that ``Task.queued_s`` was read off."""
        return self._loop.time()

    def append(self, task: Task, *, waited_s: float = 0.0) -> None:
        """Queue a task, last in line."""
        task.queued_s = self._loop.time()
        self._add(task, waited_s)

    def append_first(self, task: Task) -> None:
        """Queue a task again, before those of its function. For others it has waited already."""
        self._add(task, 0.0)
        self._lanes[task.function].move_to_end(task.number, last=False)

    def _add(self, task: Task, waited_s: float) -> None:
        self._lanes.setdefault(task.function, OrderedDict())[task.number] = task
        self._length += 1
        self._count(task, 1)
        if self._timeout_s is not None:
            left_s = max(0.0, self._timeout_s - waited_s)
            self._timers[task.number] = self._background.call_later(left_s, self._expire, task)

    def take(self, tasks: list[Task]) -> list[Task]:
        """Take out tasks that run together, or as many of them as BATCH_BYTES hold.

        None: inputs of them are being read.
        """
        together: list[Task] = []
        lacking: list[Task] = []
        size = 0
        for task in tasks:
            if task.input is None:
                lacking.append(task)
            else:
                size += len(task.input)
            together.append(task)
            if size >= BATCH_BYTES:
                break
        if lacking:
            self._read_inputs(lacking)
            return []
        for task in together:
            self.remove(task)
        if self._unloaded and self._loaded_bytes < MEMORY_BYTES // 2:
            self._read_inputs([])
        return together

    def remove(self, task: Task) -> bool:
        """Take a task out, wherever it is; return whether it was there."""
        lane = self._lanes.get(task.function)
        if lane is None or lane.pop(task.number, None) is None:
            return False
        self._length -= 1
        self._count(task, -1)
        if self._timers:
            timer = self._timers.pop(task.number, None)
            if timer is not None:
                timer.cancel()
        return True

    def close(self) -> None:
        """Let nothing expire any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def on_stored(self, task: Task) -> None:
        """Drop the input of a task that is on the disk, where there are many (a listener)."""
        if self._loaded_bytes > MEMORY_BYTES and task in self and task.input is not None:
            self._count(task, -1)
            task.input = None
            self._count(task, 1)

    def _count(self, task: Task, by: int) -> None:
        if task.input is None:
            self._unloaded += by
        else:
            self._loaded_bytes += by * len(task.input)

    def _expire(self, task: Task) -> None:
        if self.remove(task):
            self._events.on_expired(task)

    def _read_inputs(self, wanted: list[Task]) -> None:
        if not self._reading:
            self._reading = True
            self._background.run(self._read(wanted))

    async def _read(self, wanted: list[Task]) -> None:
        """Read the inputs of tasks, and of the next ones that lack theirs."""
        lacking = (task for task in self if task.input is None and task not in wanted)
        wanted += islice(lacking, max(0, _READ_TASKS - len(wanted)))
        try:
            bodies = await self._journal.inputs([task.number for task in wanted], MEMORY_BYTES)
        except JournalError as error:
            logger.error("Inputs of queued tasks cannot be read: %s", error)
            await asyncio.sleep(_READ_AGAIN_S)
        else:
            self._take(wanted, bodies)
        finally:
            self._reading = False
        self._events.on_loaded()

    def _take(self, wanted: list[Task], bodies: dict[int, bytes]) -> None:
        if bodies:  # those behind the last one were too large to be read
            last = next(reversed(bodies))
            wanted = wanted[: [task.number for task in wanted].index(last) + 1]
        for task in wanted:
            if task not in self or task.input is not None:
                continue
            if task.number not in bodies:
                self.remove(task)
                self._events.on_input_lost(task)
                continue
            self._count(task, -1)
            task.input = bodies[task.number]
            self._count(task, 1)


def _number_of(task: Task) -> int:
    return task.number
