"""@init that hangs, is killed, forks, or works in one worker and not in another."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from conftest import StartServer
from support.waiting import wait_until

SOURCE = """
import os, sys, time
import ogpu.service
from pydantic import BaseModel

class Data(BaseModel):
    text: str = ""

@ogpu.service.init()
def load():
    marker = {marker!r}
    if not os.path.exists(marker):
        return
    fault = open(marker).read()
    exec(fault)

@ogpu.service.expose()
def echo(data: Data) -> Data:
    return Data(text=str(os.getpid()))

ogpu.service.start()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_first_init_that_hangs(start_server: StartServer, tmp_path: Path, method: str) -> None:
    """OGPU_INIT_TIMEOUT ends the program: exit code 3, and where it hung."""
    marker = tmp_path / "fault"
    marker.write_text("time.sleep(3600)")
    server = start_server(
        SOURCE.format(marker=str(marker)),
        wait=False, OGPU_INIT_TIMEOUT=2, OGPU_START_METHOD=method,
    )  # fmt: skip
    assert server.wait_exit() == 3
    assert "its @init took longer than 2 s (OGPU_INIT_TIMEOUT); it was here:" in server.log
    assert "in load" in server.log


def test_a_later_init_that_hangs(start_server: StartServer, tmp_path: Path) -> None:
    """It is killed and tried again; readiness waits for the one that works."""
    marker = tmp_path / "fault"
    server = start_server(SOURCE.format(marker=str(marker)), OGPU_INIT_TIMEOUT=0.5)
    marker.write_text("time.sleep(3600)")
    os.kill(server.slot()["pid"], signal.SIGKILL)
    wait_until(
        lambda: (server.slot()["last_exit"] or {}).get("reason") == "init_timed_out", "timed out"
    )
    marker.unlink()
    wait_until(lambda: server.http.get("/readyz").status_code == 200, "ready again")
    assert server.run("echo", "a")["state"] == "succeeded"


def test_a_first_init_that_is_killed(start_server: StartServer, tmp_path: Path) -> None:
    marker = tmp_path / "fault"
    marker.write_text("os.kill(os.getpid(), 9)")
    server = start_server(SOURCE.format(marker=str(marker)), wait=False)
    assert server.wait_exit() == 3
    assert "did not become ready: it was ended by SIGKILL in @init" in server.log


def test_a_later_init_that_crashes(start_server: StartServer, tmp_path: Path) -> None:
    """Why is in the log: the signal, and the stack."""
    marker = tmp_path / "fault"
    server = start_server(SOURCE.format(marker=str(marker)))
    marker.write_text("import ctypes; ctypes.string_at(0)")
    os.kill(server.slot()["pid"], signal.SIGKILL)
    server.wait_log("it was ended by SIGSEGV in @init\nFatal Python error: Segmentation fault")
    marker.unlink()
    wait_until(lambda: server.slot()["state"] == "ready", "ready again")
    assert server.slot()["last_exit"]["signal"] == signal.SIGSEGV


def test_an_init_that_forks(start_server: StartServer, tmp_path: Path) -> None:
    """The child ends when its @init does, or with the worker; it never answers for its parent."""
    marker = tmp_path / "fault"
    marker.write_text("os.fork() or os.fork() or time.sleep(3600)")
    server = start_server(SOURCE.format(marker=str(marker)), OGPU_WORKERS=2, wait=False)
    server.wait_listening()
    wait_until(lambda: server.slot(1)["state"] == "ready", "both are ready")
    pids = {slot["pid"] for slot in server.workers()["workers"]}
    answers = {int(server.run("echo", f"a{n}")["result"]["text"]) for n in range(20)}
    assert answers <= pids


def test_an_init_that_fails_in_one_worker_only(start_server: StartServer, tmp_path: Path) -> None:
    """The others serve meanwhile, and it is tried again."""
    marker = tmp_path / "fault"
    server = start_server(SOURCE.format(marker=str(marker)), OGPU_WORKERS=2, OGPU_CRASH_BUDGET=1000)
    wait_until(lambda: server.slot(1)["state"] == "ready", "both are ready")
    marker.write_text("raise RuntimeError('this time not')")
    os.kill(server.slot(1)["pid"], signal.SIGKILL)
    wait_until(lambda: server.slot(1)["generation"] > 2, "tries")
    assert server.http.get("/readyz").json()["ready_workers"] == 1
    assert server.run("echo", "a")["worker"]["slot"] == 0
    marker.unlink()
    wait_until(lambda: server.slot(1)["state"] == "ready", "ready again")
