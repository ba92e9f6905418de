"""One place in the pool: its states, which may follow which, and what is known of its worker.

Runs in the front; the supervisor moves slots, and nobody else.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any

import psutil

from ..task import Task
from .process import WorkerProcess


class SlotState(str, Enum):
    """What a slot is doing."""

    STARTING = "starting"  # a worker is being made, or runs @init
    READY = "ready"
    BUSY = "busy"
    STOPPING = "stopping"  # its worker is being killed, or leaves, and is not gone yet
    BACKING_OFF = "backing_off"  # empty until the next try


TRANSITIONS: dict[SlotState, frozenset[SlotState]] = {
    SlotState.STARTING: frozenset({SlotState.READY, SlotState.STOPPING}),
    SlotState.READY: frozenset({SlotState.BUSY, SlotState.STOPPING}),
    SlotState.BUSY: frozenset({SlotState.READY, SlotState.STOPPING}),
    SlotState.STOPPING: frozenset({SlotState.STARTING, SlotState.BACKING_OFF}),
    SlotState.BACKING_OFF: frozenset({SlotState.STARTING}),
}


class ExitReason(str, Enum):
    """Why a worker ended."""

    TIMED_OUT = "timed_out"  # killed: its task passed the deadline
    CANCELLED = "cancelled"  # killed: its task was cancelled
    INIT_FAILED = "init_failed"
    DIED = "died"  # by itself: a signal, an exit, an out-of-memory kill
    BROKEN_CHANNEL = "broken_channel"  # killed: it closed its channel, or wrote garbage to it
    SHUT_DOWN = "shut_down"


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
    task: Task | None = None
    run: int = 0  # the number of the Run that is out; answers to others are late news
    deadline_s: float = 0.0  # of the running task, on the monotonic clock
    deadline_timer: asyncio.TimerHandle | None = None
    backoff_timer: asyncio.TimerHandle | None = None
    exit_reason: ExitReason | None = None  # of the worker that is leaving, once known
    tasks_done: int = 0
    failures: int = 0  # starts in a row that led to nothing
    started_at: datetime | None = None
    last_exit: Exit | None = None
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
        self.exit_reason = None
        self.tasks_done = 0
        self.started_at = datetime.now(timezone.utc)

    def describe(self) -> dict[str, Any]:
        """Return the slot as ``GET /workers`` shows it."""
        pid = self.process.pid if self.process else None
        last = self.last_exit
        return {
            "slot": self.index,
            "generation": self.generation,
            "state": self.state.value,
            "pid": pid,
            "device": self.device,
            "task_address": self.task.address if self.task else None,
            "function": self.task.function if self.task else None,
            "tasks_done": self.tasks_done,
            "rss_bytes": _rss_bytes(pid),
            "started_at": self.started_at,
            "last_exit": last
            and {
                "reason": last.reason.value,
                "signal": last.signal,
                "exit_code": last.exit_code,
                "at": last.at,
            },
        }


def _rss_bytes(pid: int | None) -> int | None:
    if pid is None:
        return None
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it died a moment ago
        return None
