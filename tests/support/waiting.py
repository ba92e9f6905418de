"""Waiting for a condition, with a bound: the tests' only way to wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def wait_until(
    condition: Callable[[], Result], what: str, timeout_s: float = 15.0, every_s: float = 0.01
) -> Result:
    """Return the condition's first true value; fail with ``what`` when there is none in time."""
    limit = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > limit:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(every_s)
