"""How long to wait before the next try: exponential, jittered, bounded. Pure arithmetic."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """A rule for waits: ``first_s``, times ``factor`` for each failure more, up to ``limit_s``.

    Half of each wait is random, so that what failed together does not come back together.

    Example:
        >>> Backoff(first_s=0.1, limit_s=30).wait_s(failures=3)   # between 0.2 and 0.4
    """

    first_s: float
    limit_s: float
    factor: float = 2.0

    def wait_s(self, failures: int) -> float:
        """Return the wait in seconds after that many failures in a row (1 or more)."""
        # The exponent is bounded too: 2.0 ** 1100 is an OverflowError.
        full = min(self.limit_s, self.first_s * self.factor ** min(failures - 1, 64))
        return full * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


# Before a slot, or a template, is tried again after a start that failed.
RESTART_BACKOFF = Backoff(first_s=0.2, limit_s=30.0)
