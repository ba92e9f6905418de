"""One place in the pool: its states, which may follow which, and what is known of its worker.

Runs in the front, on its event loop; only the pool's own files move slots.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from ..processes import resident_bytes
from ..task import Task
from .process import WorkerProcess


class SlotState(str, Enum):
    """What a slot is doing."""

    STARTING = "starting"  # a worker is being made, or runs @init
    READY = "ready"
    BUSY = "busy"
    STOPPING = "stopping"  # its worker is being killed, or leaves, and is not gone yet
    UNKILLABLE = "unkillable"  # SIGKILL has not ended it, or something that it started
    BACKING_OFF = "backing_off"  # empty until the next try


TRANSITIONS: dict[SlotState, frozenset[SlotState]] = {
    SlotState.STARTING: frozenset({SlotState.READY, SlotState.STOPPING}),
    SlotState.READY: frozenset({SlotState.BUSY, SlotState.STOPPING}),
    SlotState.BUSY: frozenset({SlotState.READY, SlotState.STOPPING}),
    SlotState.STOPPING: frozenset(
        {SlotState.STARTING, SlotState.BACKING_OFF, SlotState.UNKILLABLE}
    ),
    SlotState.UNKILLABLE: frozenset({SlotState.STARTING, SlotState.BACKING_OFF}),
    SlotState.BACKING_OFF: frozenset({SlotState.STARTING}),
}


class ExitReason(str, Enum):
    """Why a worker ended."""

    DIED = "died"  # by itself: a signal that was not ours, an exit
    OUT_OF_MEMORY = "out_of_memory"  # killed by the kernel
    INIT_FAILED = "init_failed"
    # Killed:
    TIMED_OUT = "timed_out"  # its task passed the deadline
    CANCELLED = "cancelled"  # its task was cancelled
    INIT_TIMED_OUT = "init_timed_out"
    BROKEN_CHANNEL = "broken_channel"  # it closed its channel, or wrote garbage to it
    TEMPLATE_DIED = "template_died"
    SHUT_DOWN = "shut_down"
    # Recycled, which is a kill between two tasks; see wire.RecycleReason:
    MAX_TASKS = "max_tasks"
    MAX_RSS = "max_rss"
    RECYCLE_WORKER = "recycle_worker"
    DEVICE_ERROR = "device_error"
    DEVICE_LOST = "device_lost"
    LEFTOVERS = "leftovers"


# Those of which the worker is well enough to go on until the other slots are at work.
CAN_WAIT = frozenset({ExitReason.MAX_TASKS, ExitReason.MAX_RSS})
# Those that say nothing bad about the worker.
_NO_FAULT = CAN_WAIT | {ExitReason.TIMED_OUT, ExitReason.CANCELLED, ExitReason.RECYCLE_WORKER}


@dataclass(frozen=True)
class Exit:
    """How the last worker of a slot ended."""

    reason: ExitReason
    signal: int | None
    exit_code: int | None
    at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))


class IllegalSlotTransitionError(Exception):
    """Raised when a slot is moved where its state does not lead: a defect of this package."""


@dataclass(eq=False)
class Slot:
    """A place that a worker fills; ``generation`` counts the workers that have filled it."""

    index: int
    state: SlotState = SlotState.STARTING
    generation: int = 0
    process: WorkerProcess | None = None
    # By the number of the Run that is out: one task, or those of a batch that have not ended.
    # Answers to others are late news.
    tasks: dict[int, Task] = field(default_factory=dict)
    given: int = 0  # how many tasks were given with the last order
    # Orders that its worker may take next, likewise; their tasks wait (``ahead.py``).
    ahead: dict[int, Task] = field(default_factory=dict)
    began_s: float = 0.0  # when the running task, or batch, did, on the monotonic clock
    deadline_s: float = math.inf  # of the running task, on the monotonic clock; inf: there is none
    # One timer for many tasks: it rings at the deadline of an earlier one, and is set again.
    deadline_timer: asyncio.TimerHandle | None = None
    rings_s: float = 0.0  # when it does, on the monotonic clock
    timer: asyncio.TimerHandle | None = None  # of a back-off, or of @init
    exit_reason: ExitReason | None = None  # of the worker that is leaving, once known
    recycle: ExitReason | None = None  # why its worker is to be replaced when that is possible
    max_tasks: int | None = None  # of this worker
    was_asked: bool = False  # its handler has been asked to stop
    tasks_done: int = 0
    failures: int = 0  # lives in a row that led to nothing
    started_at: datetime | None = None
    ready_s: float | None = None  # when its worker became ready, on the monotonic clock
    last_exit: Exit | None = None
    last_failure: str | None = None  # why the worker did not become ready, in words
    device: str | None = None

    def move(self, to: SlotState) -> None:
        """Go to another state.

        Raises:
            IllegalSlotTransitionError: it does not follow the present one.
        """
        if to not in TRANSITIONS[self.state]:
            raise IllegalSlotTransitionError(f"slot {self.index}: {self.state} → {to}")
        self.state = to

    def begin_worker(self) -> None:
        """Count a new worker, of which nothing is known yet."""
        self.generation += 1
        self.process = None
        self.exit_reason = self.recycle = None
        self.was_asked = False
        self.tasks_done = 0
        self.ready_s = None
        self.last_failure = None
        self.started_at = datetime.now(timezone.utc)

    def cancel_timers(self) -> None:
        """Call off what was to happen to the slot."""
        for timer in (self.timer, self.deadline_timer):
            if timer is not None:
                timer.cancel()
        self.timer = self.deadline_timer = None

    def was_useful(self, now_s: float, least_life_s: float) -> bool:
        """Tell whether the worker that is gone did anything, or lived for some time."""
        lived = self.ready_s is not None and now_s - self.ready_s >= least_life_s
        return lived or self.tasks_done > 0 or self.exit_reason in _NO_FAULT

    def describe(self) -> dict[str, Any]:
        """Return the slot as ``GET /workers`` shows it."""
        pid = self.process.pid if self.process else None
        last, task = self.last_exit, next(iter(self.tasks.values()), None)
        return {
            "slot": self.index,
            "generation": self.generation,
            "state": self.state.value,
            "pid": pid,
            "device": self.device,
            "task_address": task.address if task else None,
            "function": task.function if task else None,
            "tasks_done": self.tasks_done,
            "rss_bytes": None if pid is None else resident_bytes(pid) or None,  # 0: it is dead
            "started_at": self.started_at,
            "last_exit": last
            and {
                "reason": last.reason.value,
                "signal": last.signal,
                "exit_code": last.exit_code,
                "at": last.at,
            },
        }
