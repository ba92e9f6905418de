"""Workers that SIGKILL does not end: their slot is lost, and the service says so.

A process whose tracer does not wait for it stays when it is killed (ptrace(2)), as one does that
hangs in a driver; so does one in a frozen cgroup (version 1).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from conftest import StartServer
from support.waiting import wait_until

_PTRACE_SEIZE = 0x4206
_FREEZER = Path("/sys/fs/cgroup/freezer")
Undying = Callable[[int], "Iterator[Callable[[], None]]"]


@contextmanager
def traced(pid: int) -> Iterator[Callable[[], None]]:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    if libc.ptrace(_PTRACE_SEIZE, pid, None, None) != 0:
        pytest.skip(f"ptrace is not allowed here: {os.strerror(ctypes.get_errno())}")

    def let_go() -> None:
        with suppress(ChildProcessError):
            while os.WIFSTOPPED(os.waitpid(pid, 0x40000000)[1]):  # __WALL
                continue

    try:
        yield let_go
    finally:
        let_go()


@contextmanager
def frozen(pid: int) -> Iterator[Callable[[], None]]:
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


@pytest.mark.parametrize("undying", [traced, frozen])
def test_a_slot_is_lost_until_its_worker_is_gone(
    start_server: StartServer,
    undying: Callable[[int], contextmanager[Callable[[], None]]],  # type: ignore[valid-type]
) -> None:
    """Its task ends at the deadline; the other worker serves; when it is gone it is replaced."""
    server = start_server(OGPU_WORKERS=2)
    wait_until(lambda: server.slot(1)["state"] == "ready", "both are ready")
    server.post("sleep_for_a_second", "hung", {"number": 3600})
    slot = server.wait_state("hung", "running")["worker"]["slot"]
    with undying(server.slot(slot)["pid"]) as let_go:  # type: ignore[attr-defined]
        assert server.wait_state("hung", "timed_out")["error"]["reason"] == "timed_out"
        wait_until(lambda: server.slot(slot)["state"] == "unkillable", "unkillable")
        assert "is not gone 5 s after SIGKILL" in server.log
        answer = server.http.get("/readyz")
        assert answer.status_code == 200
        assert (answer.json()["ready_workers"], answer.json()["unkillable_workers"]) == (1, 1)
        assert server.run("echo", "a")["worker"]["slot"] == 1 - slot
        assert 'ogpu_workers{state="unkillable"} 1.0' in server.http.get("/metrics").text
        let_go()
        wait_until(lambda: server.slot(slot)["state"] == "ready", "the slot is filled again")
    assert server.stop() == 0


def test_the_service_ends_when_nothing_is_left_to_work_with(start_server: StartServer) -> None:
    """Not ready, with the reason; then exit code 4, though the process is still there."""
    server = start_server()
    server.post("sleep_for_a_second", "hung", {"number": 3600})
    server.wait_state("hung", "running")
    with traced(server.slot()["pid"]):
        assert server.wait_state("hung", "timed_out")
        wait_until(
            lambda: "does not end, though" in server.http.get("/readyz").json().get("detail", ""),
            "not ready, and why",
        )
        assert server.wait_exit(30) == 4
