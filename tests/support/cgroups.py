"""A memory cgroup with a limit, to run a server in; in either version, where one can be made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .waiting import wait_until

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
# What enters the cgroup must not have used memory outside of it: hence a fresh program, in there.
_ENTER = """
import os, sys
with open(sys.argv[1], "w") as processes:
    processes.write(str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-X", "dev", "-W", "error", *sys.argv[2:]])
"""


class MemoryCgroup:
    """A cgroup below that of the tests, or below one above it.

    Raises:
        OSError: none can be made here; the message says what was tried last.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._folder = _make_folder()
        try:
            self._set("memory.max", "memory.limit_in_bytes", limit_bytes)
            # No swap: where there is some, the limit would only make things slow.
            self._set("memory.swap.max", "memory.memsw.limit_in_bytes", 0, limit_bytes)
        except OSError:
            self._folder.rmdir()
            raise

    def _set(self, v2: str, v1: str, value: int, value_v1: int | None = None) -> None:
        for name, number in ((v2, value), (v1, value if value_v1 is None else value_v1)):
            if (self._folder / name).exists():
                (self._folder / name).write_text(str(number))

    def command(self, source: Path) -> list[str]:
        """Return the arguments of an interpreter that runs a source in here."""
        return ["-c", _ENTER, str(self._folder / "cgroup.procs"), str(source)]

    def close(self) -> None:
        """Remove it, once the last process in it is reaped."""

        def removed() -> bool:
            try:
                self._folder.rmdir()
            except OSError:
                return False
            return True

        wait_until(removed, "the cgroup is removed")


def _make_folder() -> Path:
    reason = OSError("no memory controller is mounted below /sys/fs/cgroup")
    for parent in _parents():
        folder = parent / f"ogpu-test-{os.getpid()}"
        try:
            if (parent / "cgroup.subtree_control").exists():
                # Refused where processes are in the parent itself (cgroups(7), "no internal
                # processes"), unless that is the root.
                (parent / "cgroup.subtree_control").write_text("+memory")
            folder.mkdir()
        except OSError as error:
            reason = error
        else:
            return folder
    raise reason


def _parents() -> Iterator[Path]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield from _upwards(_V1, path)
        elif not controllers:
            for root in _V2:
                if "memory" in _words(root / "cgroup.controllers"):
                    yield from _upwards(root, path)


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """Give the cgroup of that path, then those above it; in a container not all are there."""
    own = root / path.lstrip("/")
    for folder in (own, *own.parents):
        if (folder / "cgroup.procs").exists():
            yield folder
        if folder == root:
            return


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
