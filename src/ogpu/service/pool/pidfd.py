"""Waiting for the end of processes through their pidfds, and burying those that come to the front.

Runs in the front. Whoever waits for a child here is the only one to do so: a pid of a child that
was not waited for cannot have been given to another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os

from ..processes import kill_child, own_children, state_of


async def ended_within(pid: int, timeout_s: float) -> bool:
    """Wait until a child of this process has ended (a zombie has); return whether it did."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return await _ended_within(pidfd, timeout_s)
    finally:
        os.close(pidfd)


async def _ended_within(pidfd: int, timeout_s: float) -> bool:
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def on_readable() -> None:  # pidfd_open(2): it is readable when the process has ended
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(pidfd, on_readable)
    try:
        await asyncio.wait([ended], timeout=timeout_s)
    finally:
        loop.remove_reader(pidfd)
    return ended.done()


def reap(pid: int) -> int | None:
    """Reap a child that has ended; return its exit code (negative: a signal), None: not known."""
    try:
        reaped, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:  # somebody did already, or the source ignores SIGCHLD
        return None
    return os.waitstatus_to_exitcode(status) if reaped else None


def reap_ended(but: set[int]) -> None:
    """Reap the children of this process that have ended, but for some.

    As PID 1 of a container it is the parent of all that lost theirs.
    """
    for pid in own_children() - but:
        if state_of(pid) == "Z":
            reap(pid)


def kill_children(but: set[int]) -> set[int]:
    """Kill and reap the children of this process, but for some; return those that are left.

    What they had themselves comes to this process as they end: call it until nothing is left.
    """
    left = own_children() - but
    for pid in left:
        with contextlib.suppress(PermissionError):  # it runs as another user
            kill_child(pid)
        reap(pid)
    return left
