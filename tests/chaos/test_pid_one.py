"""The service as PID 1 of a PID namespace, as in a container without an init."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from conftest import StartServer
from support.processes import is_gone, zombies
from support.server import Server
from support.waiting import wait_until

_UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    if subprocess.run([*_UNSHARE, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no PID namespace can be made here")


def front_of(server: Server) -> int:
    (front,) = psutil.Process(server.process.pid).children()
    return front.pid


def whole(server: Server) -> bool:
    return all(slot["state"] == "ready" for slot in server.workers()["workers"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_as_pid_one_everything_works(
    start_server: StartServer, tmp_path: Path, method: str
) -> None:
    """Tasks run; a hung one is killed with its family; SIGTERM ends it all; no zombie is left."""
    server = start_server(prefix=_UNSHARE, OGPU_WORKERS=2, OGPU_START_METHOD=method)
    assert server.run("facts", "a", {"text": "os.getppid() > 1"})["result"]["text"] == "True"
    pids = tmp_path / "pids"
    assert server.run("hangs_with_family", "b", {"text": str(pids)})["state"] == "timed_out"
    front = psutil.Process(front_of(server))
    assert len(pids.read_text().split()) == 4
    wait_until(lambda: whole(server), "every worker is ready")
    # The front, its template, two workers, perhaps a standby: nothing else is in the namespace.
    expected = 4 if method == "spawn" else 3
    wait_until(lambda: len(front.children(recursive=True)) == expected, "nothing else")
    assert zombies(front.pid) == []
    os.kill(front.pid, signal.SIGTERM)
    assert server.wait_exit() == 0


def test_pid_one_reaps_what_comes_to_it(start_server: StartServer) -> None:
    """Orphans of commands that were run in the container (docker exec) do not stay as zombies."""
    server = start_server(prefix=_UNSHARE)
    front = front_of(server)
    orphan = "for i in 1 2 3; do (sleep 0.1; true) & done"
    enter = ["nsenter", "--target", str(front), "--pid", "sh", "-c", orphan]
    subprocess.run(enter, check=True)
    before = len(psutil.Process(front).children())
    assert before > 1, "the orphans went elsewhere: nothing is tested"
    wait_until(lambda: len(psutil.Process(front).children()) == 1, "the template alone")
    assert server.run("echo", "a")["state"] == "succeeded"


def test_a_killed_template_of_pid_one_is_replaced(start_server: StartServer) -> None:
    server = start_server(prefix=_UNSHARE)
    front = psutil.Process(front_of(server))
    (template,) = front.children()
    worker = template.children()[0]
    template.kill()
    wait_until(lambda: is_gone(template.pid) and is_gone(worker.pid), "gone")
    assert server.run("echo", "a")["state"] == "succeeded"
    assert zombies(front.pid) == []


def test_the_death_of_pid_one_leaves_nothing(start_server: StartServer, tmp_path: Path) -> None:
    """SIGKILL from outside, in the middle of a task with a family."""
    server = start_server(prefix=_UNSHARE)
    pids = tmp_path / "pids"
    server.post("family", "a", {"text": str(pids)})
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 4, "a family")
    front = psutil.Process(front_of(server))
    everything = [front, *front.children(recursive=True)]
    assert len(everything) >= 3 + 4
    front.kill()
    wait_until(lambda: all(is_gone(p.pid) for p in everything), "nothing left")
