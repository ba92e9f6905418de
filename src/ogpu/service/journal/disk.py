"""Room on the disk: kept for what was accepted, before it is used up by what is new.

Runs in the journal's thread. A disk that the journal itself has filled to the last byte is a trap:
the WAL cannot go to the database, which cannot grow, and nothing can be deleted, since that is
written to the WAL first. So new tasks are refused while there is still room for the ends of others.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from ..errors import JournalError

_PAGE_BYTES = 4096
# 16 MB of WAL: pages that many commits have written go to their place once (33 and 25 µs a row, in
# commits of 100 rows with random addresses, with 1,000 pages and 4,000). Less on a small disk.
_WAL_PAGES = 4000
_LEAST_WAL_PAGES = 50
_MARGIN_BYTES = 16 * 1024 * 1024
_LOOK_EVERY_S = 0.5
_PART_OF_DISK = 20  # margin and WAL take at most the twentieth part each


class Disk:
    """The file system of one database file; None: it is in memory, and there is always room."""

    def __init__(self, database: str | None) -> None:
        self._folder = None if database is None else Path(database).parent
        self._wal = Path(f"{database}-wal")
        total = 2**63 if self._folder is None else self._total_bytes()
        self._margin_bytes = min(_MARGIN_BYTES, total // _PART_OF_DISK)
        pages = total // _PART_OF_DISK // _PAGE_BYTES
        self.wal_pages = max(_LEAST_WAL_PAGES, min(_WAL_PAGES, pages))
        self._looked_s = -math.inf
        self._free_bytes = 0
        self.vacuum_pages = max(8, self._margin_bytes // _PAGE_BYTES // 4)

    def require(self, body_bytes: int, *, is_new: bool) -> None:
        """Check that so many bytes can be written, and the WAL still go to its place after them.

        Raises:
            JournalError: there is no room for them; for new tasks that is so a little sooner.
        """
        if self._folder is None:
            return
        # The result of a new task may be as large as its input, and comes before that goes.
        needed = 3 * body_bytes + self._margin_bytes if is_new else body_bytes
        self._look(needed)
        if self._free_bytes < needed:
            raise JournalError(self._words())
        self._free_bytes -= 2 * body_bytes  # once in the WAL, once in the database

    def trouble(self) -> str | None:
        """Return why no new task should be accepted, or None."""
        if self._folder is None:
            return None
        self._look(self._margin_bytes)
        return None if self._free_bytes >= self._margin_bytes else self._words()

    def _look(self, needed: int) -> None:
        """Look how much is free, if that is long ago or matters.

        Each look costs three system calls, and after each the GIL has to be won back from a busy
        event loop: done twice in every commit, that made commits 1.4 ms long instead of 1.
        """
        now = time.monotonic()
        if now - self._looked_s > _LOOK_EVERY_S or self._free_bytes < 2 * needed:
            self._looked_s = now
            self._free_bytes = self._measure_free_bytes()

    def _words(self) -> str:
        return f"the disk of {self._folder} is full, or nearly so"

    def _total_bytes(self) -> int:
        status = os.statvfs(str(self._folder))
        return status.f_blocks * status.f_frsize

    def _measure_free_bytes(self) -> int:
        """Return what is free when all that is in the WAL has gone to the database, at least."""
        status = os.statvfs(str(self._folder))
        try:
            in_wal = self._wal.stat().st_size
        except FileNotFoundError:
            in_wal = 0
        return status.f_bavail * status.f_frsize - in_wal
