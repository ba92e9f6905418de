"""Workers that SIGKILL does not end, or what they have left: what is lost, and what is not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from conftest import StartServer
from support.server import Server
from support.undying import Undying, frozen, traced
from support.waiting import wait_until

SOURCE = """
import os, subprocess, sys, time
import ogpu.service
from pydantic import BaseModel

class Data(BaseModel):
    text: str = ""

def child(path):
    child = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    with open(path + ".new", "w") as file:
        file.write(str(child.pid))
    os.rename(path + ".new", path)
    while os.path.exists(path):
        time.sleep(0.01)

@ogpu.service.expose(timeout=30)
def leaves_a_child_and_exits(data: Data) -> Data:
    child(data.text)
    os._exit(7)

@ogpu.service.expose()
def has_a_child(data: Data) -> Data:
    child(data.text)
    return data

@ogpu.service.expose()
def echo(data: Data) -> Data:
    return data

ogpu.service.start()
"""


def wait_whole(server: Server) -> None:
    wait_until(
        lambda: all(s["state"] == "ready" for s in server.workers()["workers"]), "all are ready"
    )


def child_of_task(server: Server, function: str, path: Path) -> int:
    server.post(function, function, {"text": str(path)})
    wait_until(path.exists, "a child")
    return int(path.read_text())


@pytest.mark.parametrize("undying", [traced, frozen])
def test_a_slot_is_lost_until_its_worker_is_gone(
    start_server: StartServer, undying: Undying
) -> None:
    """Its task ends at the deadline; the other worker serves; when it is gone it is replaced."""
    server = start_server(OGPU_WORKERS=2)
    wait_whole(server)
    server.post("sleep_for_a_second", "hung", {"number": 3600})
    slot = server.wait_state("hung", "running")["worker"]["slot"]
    with undying(server.slot(slot)["pid"]) as let_go:
        assert server.wait_state("hung", "timed_out")["error"]["reason"] == "timed_out"
        wait_until(lambda: server.slot(slot)["state"] == "unkillable", "unkillable")
        server.wait_log("is not gone 5 s after SIGKILL")
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


def test_a_first_init_that_cannot_be_killed_ends_the_start(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Nobody waits for slots that were never filled: exit code 3."""
    server = start_server(wait=False, OGPU_WORKERS=3, OGPU_INIT_TIMEOUT=1, ZOO_INIT_SLEEP_S=3600)
    server.wait_log("Workers are made by")
    template = int(server.log.partition("(template: pid ")[2].partition(")")[0])
    children = Path(f"/proc/{template}/task/{template}/children")
    (worker,) = wait_until(lambda: children.read_text().split(), "the first worker")
    with traced(int(worker)):
        assert server.wait_exit(30) == 3


def test_a_task_ends_though_what_its_worker_left_does_not(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Its worker has exited, a child of that hangs: failed, with the slot lost to the child."""
    server = start_server(SOURCE, OGPU_WORKERS=2)
    wait_whole(server)
    path = tmp_path / "child"
    with frozen(child_of_task(server, "leaves_a_child_and_exits", path)):
        path.unlink()
        task = server.wait_state("leaves_a_child_and_exits", "failed")
        assert task["error"]["reason"] == "worker_died"
        slot = task["worker"]["slot"]
        assert server.slot(slot)["state"] == "unkillable"
        assert server.run("echo", "a")["worker"]["slot"] == 1 - slot
    wait_whole(server)
    assert server.slot(slot)["last_exit"]["exit_code"] == 7


def test_such_a_task_can_be_cancelled(start_server: StartServer, tmp_path: Path) -> None:
    """A DELETE while its worker ends for another reason is not lost."""
    server = start_server(SOURCE)
    path = tmp_path / "child"
    with frozen(child_of_task(server, "leaves_a_child_and_exits", path)):
        path.unlink()
        wait_until(lambda: server.slot()["state"] == "stopping", "its worker has ended")
        answer = server.http.delete("/tasks/leaves_a_child_and_exits")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")


def test_an_orphan_of_a_dead_template_costs_one_slot(
    start_server: StartServer, tmp_path: Path
) -> None:
    """The others are filled by the next template; that one is when the orphan has ended."""
    server = start_server(SOURCE, OGPU_WORKERS=3)
    wait_whole(server)
    path = tmp_path / "child"
    child = child_of_task(server, "has_a_child", path)
    stat = Path(f"/proc/{server.slot()['pid']}/stat").read_text()
    with frozen(child):
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
        wait_until(
            lambda: max(s["state"] for s in server.workers()["workers"]) == "unkillable",
            "one is lost",
        )
        wait_until(lambda: int(path.read_text()) != child, "the task runs again")
        path.unlink()
        assert server.wait_state("has_a_child", "succeeded")["attempt"] == 2
        assert server.workers()["state"] == "ready"
        states = [slot["state"] for slot in server.workers()["workers"]]
        assert states.count("unkillable") == 1
    wait_whole(server)


SIDECAR = """
import os, subprocess, sys
sidecar = subprocess.Popen(["sleep", "3600"])
open({path!r}, "a").write(str(sidecar.pid) + "\\n")
""" + SOURCE.replace("import os, subprocess, sys, time", "import time")


def test_what_the_source_starts_at_import_is_left_alone(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Also in the next template, which imports it again: it is no orphan of a worker."""
    path = tmp_path / "sidecars"
    server = start_server(SIDECAR.format(path=str(path)))
    pid = server.slot()["pid"]
    stat = Path(f"/proc/{pid}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
    wait_until(lambda: server.slot()["pid"] not in (None, pid), "another worker")
    wait_whole(server)
    os.kill(server.slot()["pid"], signal.SIGKILL)
    wait_until(lambda: server.slot()["generation"] == 3, "and another")
    wait_whole(server)
    sidecars = [int(line) for line in path.read_text().split()]
    assert len(sidecars) == 2
    assert all(Path(f"/proc/{pid}").exists() for pid in sidecars)
    assert server.stop() == 0
    wait_until(lambda: not Path(f"/proc/{sidecars[1]}").exists(), "the template's has ended")
    os.kill(sidecars[0], signal.SIGKILL)  # the front's own, which is the source's business
