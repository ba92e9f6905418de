"""The whole tree dies, however it was started and whatever it does; and nothing else dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import StartServer
from support.processes import is_gone
from support.server import Server
from support.waiting import wait_until

TREES = {
    "torchrun": 4,
    "multiprocessing_fork": 3,
    "multiprocessing_spawn": 3,
    "multiprocessing_forkserver": 3,
    "daemons": 3,
    "stopped_and_deaf": 3,
    "keeps_a_child": 1,
}
HANGING = [function for function in TREES if function != "keeps_a_child"]


def tree_of(server: Server, function: str, path: Path) -> list[int]:
    """Start a task, wait until its tree stands, and return the pids."""
    server.post(function, function, {"text": str(path)})

    def lines() -> list[str]:
        return path.read_text().split() if path.exists() else []

    wait_until(lambda: len(lines()) == TREES[function], f"the tree of {function}", 10)
    return [int(line) for line in lines()]


@pytest.mark.parametrize("function", HANGING)
def test_a_tree_dies_at_the_deadline(
    start_server: StartServer, tmp_path: Path, function: str
) -> None:
    """And with it nothing else: not the sibling, nor what the sibling has started."""
    server = start_server("trees.py", OGPU_WORKERS=2)
    wait_until(lambda: server.slot(1)["state"] == "ready", "both are ready")
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    siblings = tree_of(server, "keeps_a_child", tmp_path / "sibling")
    pids = tree_of(server, function, tmp_path / "pids")
    assert server.wait_state(function, "timed_out")
    wait_until(lambda: all(map(is_gone, pids)), "the tree is gone", 5)
    assert bystander.poll() is None
    assert not any(map(is_gone, siblings))
    assert server.task("keeps_a_child")["state"] == "running"
    bystander.kill()
    bystander.wait()
    assert server.run("echo", "a", {"text": "on"})["state"] == "succeeded"


def test_a_tree_dies_with_a_cancel(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("trees.py")
    pids = tree_of(server, "daemons", tmp_path / "pids")
    assert server.http.delete("/tasks/daemons").json()["state"] == "cancelled"
    wait_until(lambda: all(map(is_gone, pids)), "the tree is gone", 5)


def test_a_tree_dies_when_its_worker_is_recycled(start_server: StartServer, tmp_path: Path) -> None:
    """A task may leave processes to its worker; they do not outlive that."""
    server = start_server("trees.py")
    path = tmp_path / "pids"
    server.run("leaves_a_tree", "a", {"text": str(path)})
    (pid,) = map(int, path.read_text().split())
    wait_until(lambda: is_gone(pid), "the tree is gone", 5)
    wait_until(lambda: server.slot()["state"] == "ready", "a new worker")
    assert server.slot()["last_exit"]["reason"] == "recycle_worker"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_tree_dies_with_the_service(
    start_server: StartServer, tmp_path: Path, number: signal.Signals
) -> None:
    """Drained, killed, or crashed: nothing is left of any tree."""
    server = start_server("trees.py", OGPU_WORKERS=2, OGPU_DRAIN_TIMEOUT=0)
    pids = tree_of(server, "daemons", tmp_path / "a")
    pids += tree_of(server, "stopped_and_deaf", tmp_path / "b")
    workers = [slot["pid"] for slot in server.workers()["workers"]]
    os.kill(server.process.pid, number)
    assert server.wait_exit() == (0 if number == signal.SIGTERM else -number)
    wait_until(lambda: all(map(is_gone, [*pids, *workers])), "nothing is left", 5)
