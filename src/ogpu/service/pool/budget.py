"""How many starts of workers may fail, and in what time, before the service is broken.

Runs in the front. Pure arithmetic.
"""

from __future__ import annotations

from collections import deque


class CrashBudget:
    """Counts failed starts within a sliding window.

    The time that the starts themselves took is left out: five models that each fail after loading
    for a minute are as hopeless as five that fail at once.

    Example:
        >>> budget = CrashBudget(failures=5, window_s=60)
        >>> budget.spend(now_s=loop.time(), took_s=0.1)  # True at the fifth failure in a minute
    """

    def __init__(self, failures: int, window_s: float) -> None:
        self.failures = failures
        self.window_s = window_s
        self._starts_s = self._last_s = 0.0
        self._spent_s: deque[float] = deque(maxlen=failures)

    def spend(self, now_s: float, took_s: float) -> bool:
        """Count a failed start; return whether the budget is used up with it."""
        self._starts_s += min(took_s, now_s - self._last_s)  # starts may overlap
        self._last_s = now_s
        self._spent_s.append(now_s - self._starts_s)
        used_up = len(self._spent_s) == self.failures
        return used_up and self._spent_s[-1] - self._spent_s[0] <= self.window_s
