"""Which processes are there: the tests' own view, independent of the package's."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make every orphan of what the tests start a child of the test run, where it is counted."""
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def descendants() -> list[psutil.Process]:
    """Return every process below the test run that has not ended; reap the orphans that have."""
    alive = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return alive


def is_gone(pid: int) -> bool:
    """Return whether no process of that pid is alive (a zombie is not)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_standby(process: psutil.Process) -> bool:
    """Return whether a process waits to become a worker."""
    with suppress(psutil.NoSuchProcess):
        # Psutil makes one word of a title that is shorter than the arguments were, or two.
        return " ".join(process.cmdline()).split() == ["ogpu-service:", "standby"]
    return False


def open_descriptors(pid: int) -> int:
    """Count the open descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def kinds_of_descriptors(pid: int) -> dict[str, int]:
    """Count the open descriptors of a process by what they are: pipes, sockets, files by name."""
    kinds: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            kinds[str(entry.readlink()).partition(":[")[0]] += 1
    return dict(kinds)


def zombies(pid: int) -> list[int]:
    """Return the children of a process that have ended and were not waited for."""
    return [
        child.pid
        for child in psutil.Process(pid).children()
        if child.status() == psutil.STATUS_ZOMBIE
    ]
