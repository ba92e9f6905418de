"""Deliveries as the journal keeps them: which way each takes, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..task import CallbackState, Task, TaskState


class Lane(str, Enum):
    """Where deliveries wait.

    Results and failures go to receivers of their own, and what has failed once waits apart, so that
    a receiver in trouble holds up neither the other nor what is new.
    """

    RESULTS = "results"
    RESULTS_AGAIN = "results_again"
    FAILURES = "failures"
    FAILURES_AGAIN = "failures_again"

    @property
    def again(self) -> Lane:
        """The lane for the attempts after the first."""
        if self in (Lane.RESULTS, Lane.RESULTS_AGAIN):
            return Lane.RESULTS_AGAIN
        return Lane.FAILURES_AGAIN

    @staticmethod
    def first_of(state: TaskState) -> Lane:
        """Return the lane in which the end of a task is told first."""
        return Lane.RESULTS if state is TaskState.SUCCEEDED else Lane.FAILURES


@dataclass(frozen=True, slots=True)
class Delivery:
    """The end of one task, to be told to its receiver. ``since``: when that was first due."""

    task: Task
    lane: Lane
    attempts: int
    since: float


@dataclass(frozen=True, slots=True)
class DeliveryUpdate:
    """What has become of a delivery. ``due``: seconds since 1970 of the next attempt."""

    state: CallbackState
    lane: Lane
    attempts: int
    last_error: str | None
    due: float | None
    since: float

    @property
    def is_over(self) -> bool:
        """True when there is no attempt to come."""
        return self.state is not CallbackState.PENDING

    def row(self, number: int) -> tuple[object, ...]:
        """Return the update of a task's row."""
        lane = None if self.is_over else self.lane.value
        return (
            number, self.state.value, lane, self.attempts, self.last_error, self.due, self.since,
        )  # fmt: skip
