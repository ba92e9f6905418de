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
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

LOOK_EVERY_S = 1.0
# From the kill to Gone: a process gives back a hundred gigabytes, and a GPU, before it is dead.
EXPLAINS_FOR_S = 30.0
# So many kills in one look are as good as any more: no pool has so many workers.
_MAX_UNEXPLAINED = 1000
# v1 says "no limit" as the largest number of pages that a long can count in bytes.
_NO_LIMIT_BYTES = 1 << 62
_OCTAL = re.compile(r"\\([0-7]{3})")


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


@dataclass(frozen=True)
class MemoryCgroup:
    """Where a memory cgroup is seen: its folder, below ``mount_point``, in version 1 or 2."""

    version: int
    folder: PurePosixPath
    mount_point: PurePosixPath

    @property
    def count_file(self) -> Path:
        """The file that has the count of kills."""
        return Path(self.folder, "memory.events" if self.version == 2 else "memory.oom_control")

    @property
    def limit_files(self) -> Iterator[Path]:
        """The files with the limits that hold here: the cgroup's own, and those above it."""
        name = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
        for folder in (self.folder, *self.folder.parents):
            yield Path(folder, name)
            if folder == self.mount_point:
                return


class OutOfMemoryCounter:
    """Says of a worker's death whether it was for lack of memory.

    Args:
        proc: the folder of this process in /proc.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._cgroup: MemoryCgroup | None = None
        self._count: int | None = None
        self._why_unknown: str | None = None
        self._unexplained: list[float] = []  # when kills were seen that explain no death yet
        try:
            self._cgroup = find_memory_cgroup(_read(proc / "cgroup"), _read(proc / "mountinfo"))
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
            count = parse_kills(_read(self._cgroup.count_file))
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
        for file in self._cgroup.limit_files if self._cgroup else ():
            try:
                limits.append(parse_limit(_read(file)))
            except (OSError, ValueError):  # the root has none in v2, and it is for a message only
                continue
        return min((limit for limit in limits if limit is not None), default=None)


def find_memory_cgroup(cgroups: str, mounts: str) -> MemoryCgroup:
    """Find the memory cgroup of a process from its /proc files ``cgroup`` and ``mountinfo``.

    Raises:
        ValueError: it has none, or no mount shows it; the message says which.
    """
    version, path = _memory_path(cgroups)
    for mount in mounts.split("\n"):
        # proc_pid_mountinfo(5): id, parent, device, root, mount point, options, optional fields;
        # then, after a hyphen, the file system's type, the source, and its own options.
        place, _, kind = mount.partition(" - ")
        fields, kinds = place.split(" "), kind.split(" ")
        if len(fields) < 5 or len(kinds) < 3:
            continue
        if version == 2:
            has_memory = kinds[0] == "cgroup2"
        else:
            has_memory = kinds[0] == "cgroup" and "memory" in kinds[2].split(",")
        root, mount_point = (PurePosixPath(_unescape(field)) for field in fields[3:5])
        # A container sees a part of the hierarchy; and a root such as "/.." is one that was
        # mounted outside of this cgroup namespace (cgroup_namespaces(7)).
        if has_memory and path.is_relative_to(root) and ".." not in path.relative_to(root).parts:
            return MemoryCgroup(version, mount_point / path.relative_to(root), mount_point)
    raise ValueError(f"no mount of cgroup v{version} shows the memory cgroup {path}")


def _memory_path(cgroups: str) -> tuple[int, PurePosixPath]:
    """Return version and path of the memory cgroup.

    Where both versions are mounted, the memory controller is in one of them: in v1 if a line there
    names it.
    """
    unified = None
    for line in cgroups.split("\n"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            return 1, PurePosixPath(path)
        if (hierarchy, controllers) == ("0", "") and path:
            unified = PurePosixPath(path)
    if unified is None:
        raise ValueError("this process is in no memory cgroup")
    return 2, unified


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


def _unescape(field: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def _read(file: Path) -> str:
    # A path that is no UTF-8 is not found then, and the message about it can be stored.
    return file.read_text(encoding="utf-8", errors="backslashreplace")


def _in_words(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"cannot read {error.filename}: {error.strerror}"
    return str(error)
