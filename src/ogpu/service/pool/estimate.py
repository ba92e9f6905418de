"""How long a client should wait before it asks again, from what was measured. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_WEIGHT = 0.2  # of the newest measurement
MIN_RETRY_AFTER_S = 1
MAX_RETRY_AFTER_S = 3600
# Before anything was measured.
_FIRST_RUN_S = 1.0
_FIRST_INIT_S = 5.0


@dataclass
class Estimate:
    """Moving averages of how long tasks run and workers take to get ready."""

    run_s: float | None = None
    init_s: float | None = None
    _runs_s: dict[str, float] = field(default_factory=dict)  # by function

    def note_run(self, function: str, took_s: float) -> None:
        """Take a task's time into account."""
        self.run_s = _moved(self.run_s, took_s)
        self._runs_s[function] = _moved(self._runs_s.get(function), took_s)

    def run_of(self, function: str) -> float:
        """Return for how long a task of a function is expected to run; inf: none has ended yet."""
        return self._runs_s.get(function, math.inf)

    def note_init(self, took_s: float) -> None:
        """Take a worker's start into account, from its launch to its readiness."""
        self.init_s = _moved(self.init_s, took_s)

    def retry_after_s(self, *, waiting: int, slots: int, ready: int) -> int:
        """Return in how many whole seconds the queue will have been worked off.

        Args:
            waiting: tasks in the queue.
            slots: how many can run at once.
            ready: workers that have run @init; with none, one has to start first.
        """
        run_s = _FIRST_RUN_S if self.run_s is None else self.run_s
        init_s = 0.0
        if not ready:
            init_s = _FIRST_INIT_S if self.init_s is None else self.init_s
        seconds = init_s + run_s * waiting / slots
        return max(MIN_RETRY_AFTER_S, min(math.ceil(seconds), MAX_RETRY_AFTER_S))


def _moved(average: float | None, value: float) -> float:
    return value if average is None else average + _WEIGHT * (value - average)
