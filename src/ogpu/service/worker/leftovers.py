"""What a task has left running in a worker whose handler was stopped before the kill.

Runs in a worker. It is for tasks with a grace alone: what was there is noted when the run begins,
and looked at again when the handler has been asked to stop and did. Anything new that still runs
costs the worker, since nothing but the kill would stop it.

Seen are: threads, processes (those too that got away from their parents, as a worker is a
subreaper), asyncio tasks, and calls in threads of a ThreadPoolExecutor, whichever task made that
pool: an idle thread of one is nothing left over. Not seen is work that was handed to some other
thread or process that was there before, or what a C library does in threads of its own.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from types import FrameType
from typing import Any

from ..processes import descendants, state_of

# What has been told to end may need a moment for it: a killed process, a thread that saw its event.
_SETTLE_S = 0.1
_LOOK_EVERY_S = 0.005
_ENDED = ("", "Z", "X")  # proc_pid_stat(5)


class Surroundings:
    """What is there when a task begins: threads, processes, asyncio tasks.

    Example:
        >>> before = Surroundings(loop)
        >>> ...  # the task runs
        >>> before.leftovers()
        ['thread upload-1', 'process 4711']
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop
        self._threads = _busy_threads()
        self._processes = descendants()
        self._tasks = _pending_tasks(loop)

    def leftovers(self) -> list[str]:
        """Name what runs now and did not then; wait a moment for what is just ending."""
        limit = time.monotonic() + _SETTLE_S
        while True:
            found = self._look()
            if not found or time.monotonic() > limit:
                return found
            if self._loop is None:
                time.sleep(_LOOK_EVERY_S)
            else:  # tasks that were cancelled end in steps of the loop
                self._loop.run_until_complete(asyncio.sleep(_LOOK_EVERY_S))

    def _look(self) -> list[str]:
        threads = _busy_threads() - self._threads
        processes = descendants() - self._processes
        tasks = _pending_tasks(self._loop) - self._tasks
        return [
            *(f"thread {getattr(thread, 'name', thread)}" for thread in threads),
            *(f"process {pid}" for pid in processes if state_of(pid) not in _ENDED),
            *(f"asyncio task {task.get_name()}" for task in tasks),
        ]


def _busy_threads() -> set[threading.Thread | int]:
    """Return the threads that execute Python code; those that threading does not know by a number.

    A number alone would not do: that of a thread that has ended is given to the next one.
    """
    known = {thread.ident: thread for thread in threading.enumerate()}
    frames = sys._current_frames()  # noqa: SLF001 - documented, in spite of its name
    return {known.get(ident, ident) for ident, frame in frames.items() if not _is_idle(frame)}


def _is_idle(frame: FrameType) -> bool:
    """Tell whether a thread is one of a ThreadPoolExecutor without work, by what it executes."""
    where = frame.f_globals.get("__name__"), frame.f_code.co_name
    return where == ("concurrent.futures.thread", "_worker")


def _pending_tasks(loop: asyncio.AbstractEventLoop | None) -> set[asyncio.Task[Any]]:
    return set() if loop is None else asyncio.all_tasks(loop)
