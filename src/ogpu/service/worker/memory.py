"""How much memory a worker has, with all that it has started: whether it has leaked too much.

Runs in a worker, after a task. A look takes 0.02 ms, 0.02 more for each process below the worker,
and 0.01 for each thread, so it is not taken after each task where tasks are shorter than that.
"""

from __future__ import annotations

import os
import time

from ..logger import logger
from ..processes import descendants, resident_bytes

# At most a twentieth of the time is spent on looking.
_TIMES_ITS_COST = 20


class MemoryLimit:
    """Compares resident memory with OGPU_MAX_WORKER_RSS_BYTES (None: no limit)."""

    def __init__(self, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        self._next_look_s = 0.0

    def is_exceeded(self) -> bool:
        """Tell whether there is too much, where it is time for another look.

        Pages that processes share are counted in each of them.
        """
        begun = time.monotonic()
        if self._max_bytes is None or begun < self._next_look_s:
            return False
        try:
            resident = sum(map(resident_bytes, descendants() | {os.getpid()}))
        except OSError:  # a source may have used up all descriptors
            return False
        ended = time.monotonic()
        self._next_look_s = ended + _TIMES_ITS_COST * (ended - begun)
        if resident <= self._max_bytes:
            return False
        logger.warning(
            "This worker and what it has started have %d bytes in memory; "
            "OGPU_MAX_WORKER_RSS_BYTES allows %d",
            resident,
            self._max_bytes,
        )
        return True
