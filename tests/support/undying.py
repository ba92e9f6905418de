"""Processes that SIGKILL does not end, as when they hang in a driver.

One whose tracer does not wait for it stays when it is killed (ptrace(2)); so does one in a frozen
cgroup of version 1, for as long as that is frozen.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from .waiting import wait_until

LetGo = Callable[[], None]
Undying = Callable[[int], AbstractContextManager[LetGo]]

_PTRACE_SEIZE = 0x4206
_WALL = 0x40000000
_FREEZER = Path("/sys/fs/cgroup/freezer")


@contextmanager
def traced(pid: int) -> Iterator[LetGo]:
    """Keep a process from being reaped when it is dead."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(_PTRACE_SEIZE, pid, None, None) != 0:
        pytest.skip(f"ptrace is not allowed here: {os.strerror(ctypes.get_errno())}")

    def let_go() -> None:
        with suppress(ChildProcessError):
            while os.WIFSTOPPED(os.waitpid(pid, _WALL)[1]):
                continue

    try:
        yield let_go
    finally:
        let_go()


@contextmanager
def frozen(pid: int) -> Iterator[LetGo]:
    """Keep a process from dying."""
    group = _FREEZER / f"ogpu-test-{pid}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no freezer of cgroup v1 here: {error}")

    def let_go() -> None:
        (group / "freezer.state").write_text("THAWED")

    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        yield let_go
    finally:
        let_go()
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "an empty cgroup")
        group.rmdir()
