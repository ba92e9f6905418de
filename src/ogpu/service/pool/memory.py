"""Out of memory, told from other SIGKILLs: the kernel counts whom it kills for lack of memory.

Runs in the front, on its event loop. The count is kept by the memory cgroup (cgroups(7)), here the
one of this process, which its workers share. Whom it killed the kernel does not tell us; but it
counts before it sends SIGKILL (``__oom_kill_process()`` in mm/oom_kill.c), so by the time a death
is heard of, its kill has been counted.

1. Before the first worker: find the cgroup, and read the count, from which it can only rise.
2. Once a second, and at a death: read it again. What it rose by is so many kills to be explained.
3. A worker died of a SIGKILL that was not ours, and a kill is to be explained: that is the one.
4. A kill that explains no worker's death had another victim, such as a child of a handler. It is
   forgotten after a while, lest a later ``kill -9`` be taken for it.
5. The count cannot be read: a death is told with the reason why that is so.

The files are described in the kernel's Documentation/admin-guide: cgroup-v2.rst (memory.events,
memory.max) and cgroup-v1/memory.rst (memory.oom_control, memory.limit_in_bytes).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..cgroups import Cgroup, cgroup_of, read_text

LOOK_EVERY_S = 1.0
# From the kill to Gone: a process gives back a hundred gigabytes, and a GPU, before it is dead.
EXPLAINS_FOR_S = 30.0
# So many kills in one look are as good as any more: no pool has so many workers.
_MAX_UNEXPLAINED = 1000
# v1 says "no limit" as the largest number of pages that a long can count in bytes.
_NO_LIMIT_BYTES = 1 << 62


@dataclass(frozen=True)
class MemoryEvidence:
    """What the memory cgroup says of a worker's death.

    ``out_of_memory`` is None where the count cannot be read; ``why_unknown`` then says why.
    ``limit_bytes`` is the lowest limit that is known to hold for the worker, where it died of it.
    """

    out_of_memory: bool | None
    limit_bytes: int | None = None
    why_unknown: str | None = None


# Of a death that has another reason.
NOT_ASKED = MemoryEvidence(out_of_memory=False)


def count_file(cgroup: Cgroup) -> Path:
    """Return the file that has the count of kills."""
    return Path(cgroup.folder, "memory.events" if cgroup.version == 2 else "memory.oom_control")


def limit_files(cgroup: Cgroup) -> Iterator[Path]:
    """Return the files with the limits that hold: the cgroup's own, and those above it."""
    name = "memory.max" if cgroup.version == 2 else "memory.limit_in_bytes"
    return (folder / name for folder in cgroup.folders)


class OutOfMemoryCounter:
    """Says of a worker's death whether it was for lack of memory.

    Args:
        proc: the folder of this process in /proc.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._cgroup: Cgroup | None = None
        self._count: int | None = None
        self._why_unknown: str | None = None
        self._unexplained: list[float] = []  # when kills were seen that explain no death yet
        try:
            self._cgroup = cgroup_of(proc, "memory")
        except (OSError, ValueError) as error:
            self._why_unknown = _in_words(error)
        self.look()

    async def watch(self) -> None:
        """Look once a second, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.look()

    def look(self) -> None:
        """Take notice of what the kernel has counted since the last look."""
        if self._cgroup is None:
            return
        try:
            count = parse_kills(read_text(count_file(self._cgroup)))
        except (OSError, ValueError) as error:
            self._count, self._why_unknown = None, _in_words(error)
            return
        now = time.monotonic()
        risen = 0 if self._count is None else count - self._count
        self._count, self._why_unknown = count, None
        recent = [seen for seen in self._unexplained if now - seen < EXPLAINS_FOR_S]
        self._unexplained = recent + [now] * min(risen, _MAX_UNEXPLAINED)

    def explain_death(self) -> MemoryEvidence:
        """Explain the death of a worker by a SIGKILL that was not ours; ask once for each."""
        self.look()
        if self._unexplained:
            self._unexplained.pop(0)
            return MemoryEvidence(out_of_memory=True, limit_bytes=self._read_limit())
        if self._count is None:
            return MemoryEvidence(out_of_memory=None, why_unknown=self._why_unknown)
        return MemoryEvidence(out_of_memory=False)

    def _read_limit(self) -> int | None:
        limits = []
        for file in limit_files(self._cgroup) if self._cgroup else ():
            try:
                limits.append(parse_limit(read_text(file)))
            except (OSError, ValueError):  # the root has none in v2, and it is for a message only
                continue
        return min((limit for limit in limits if limit is not None), default=None)


def parse_kills(text: str) -> int:
    """Return the count of kills that ``memory.events`` or ``memory.oom_control`` gives.

    Raises:
        ValueError: there is none.
    """
    for line in text.split("\n"):
        match line.split():
            case ["oom_kill", count]:
                return int(count)
    raise ValueError("the kernel does not count out-of-memory kills (Linux 4.13 or newer does)")


def parse_limit(text: str) -> int | None:
    """Return the limit in bytes that ``memory.max`` or ``memory.limit_in_bytes`` gives, if any.

    Raises:
        ValueError: it is no number.
    """
    limit = text.strip()
    if limit == "max":
        return None
    return int(limit) if int(limit) < _NO_LIMIT_BYTES else None


def _in_words(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"cannot read {error.filename}: {error.strerror}"
    return str(error)
