"""A task and its life: the states, and which may follow which.

    accepted → queued → running → succeeded · failed · timed_out · cancelled
                 ↑ │       │
                 │ └───────│──→ failed · cancelled · expired
                 └─────────┘  the worker was lost before it took the task, or the front restarted

Runs in the front. ``Journal`` alone calls ``Task.advance``, so that every transition is recorded
and told to whoever must act on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum

from .errors import TaskError


class TaskState(str, Enum):
    """Where a task is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    is_terminal: bool  # nothing can follow

    def __init__(self, value: str) -> None:
        # Not a property, nor looked up in TRANSITIONS: it is asked ten times a task.
        self.is_terminal = value not in ("queued", "running")


TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.QUEUED: frozenset(
        {TaskState.RUNNING, TaskState.FAILED, TaskState.CANCELLED, TaskState.EXPIRED}
    ),
    TaskState.RUNNING: frozenset(
        {
            TaskState.QUEUED,
            TaskState.SUCCEEDED,
            TaskState.FAILED,
            TaskState.TIMED_OUT,
            TaskState.CANCELLED,
        }
    ),
    TaskState.SUCCEEDED: frozenset(),
    TaskState.FAILED: frozenset(),
    TaskState.TIMED_OUT: frozenset(),
    TaskState.CANCELLED: frozenset(),
    TaskState.EXPIRED: frozenset(),
}


class CallbackState(str, Enum):
    """Where the delivery of a task's end is."""

    NONE = "none"  # nobody is to be told
    PENDING = "pending"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


@dataclass(frozen=True, slots=True)
class Callback:
    """The delivery of a task's end: how often it was tried, and what went wrong last."""

    state: CallbackState = CallbackState.NONE
    attempts: int = 0
    last_error: str | None = None


NO_CALLBACK = Callback()
PENDING_CALLBACK = Callback(CallbackState.PENDING)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a running task says it is."""

    fraction: float
    message: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerReference:
    """Which worker ran a task."""

    slot: int
    generation: int
    pid: int
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended: with a result, or with an error; and what it printed last."""

    state: TaskState
    result: bytes | None = None
    error: TaskError | None = None
    output: str | None = None


class IllegalTransitionError(Exception):
    """Raised when a task is asked to go where its state does not lead: a defect of this package."""


@dataclass(eq=False, slots=True)
class Task:
    """One accepted request, named by ``(function, address)``; ``number`` and ``id`` are its own.

    ``input`` is None where it is in the journal alone: of tasks that wait far back in the queue,
    and of those that are over.
    """

    number: int
    id: str
    function: str
    address: str
    input: bytes | None
    timeout_s: float | None = None
    state: TaskState = TaskState.QUEUED
    attempt: int = 1
    losses: int = 0  # attempts that ended with their worker or their front, and not by our will
    queued_s: float = 0.0  # when this front has first queued it, on the event loop's clock
    accepted_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    started_at: datetime | None = None
    finished_at: datetime | None = None
    deadline: datetime | None = None
    worker: WorkerReference | None = None
    progress: Progress | None = None
    result: bytes | None = None
    error: TaskError | None = None
    output: str | None = None
    callback: Callback = NO_CALLBACK

    @property
    def key(self) -> tuple[str, str]:
        """The task's name: function and address."""
        return (self.function, self.address)

    @property
    def is_active(self) -> bool:
        """True while a POST of the same name would join this task and not start a new one."""
        return not self.state.is_terminal or self.callback.state is CallbackState.PENDING

    def advance(self, to: TaskState) -> None:
        """Go to the next state.

        Raises:
            IllegalTransitionError: it does not follow the present one.
        """
        if to not in TRANSITIONS[self.state]:
            raise IllegalTransitionError(f"{self.key}: {self.state.value} → {to.value}")
        self.state = to
