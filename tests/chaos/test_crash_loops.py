"""Workers that cannot start, again and again: a back-off, a budget, and an end with a reason."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from conftest import StartServer
from support.server import Server
from support.waiting import wait_until

SOURCE = """
import os, time
import ogpu.service
from pydantic import BaseModel

class Data(BaseModel):
    text: str = ""

@ogpu.service.init()
def load():
    if os.path.exists({marker!r}):
        raise RuntimeError("the weights are gone")

@ogpu.service.expose()
def echo(data: Data) -> Data:
    return data

@ogpu.service.expose()
def dies(data: Data) -> Data:
    os._exit(7)

@ogpu.service.expose()
def waits(data: Data) -> Data:
    while not os.path.exists(data.text):
        time.sleep(0.01)
    return data

ogpu.service.start()
"""


def kill_worker(server: Server, index: int = 0) -> None:
    wait_until(lambda: server.slot(index)["state"] in ("ready", "busy"), "a worker")
    os.kill(server.slot(index)["pid"], signal.SIGKILL)


def test_a_crash_loop_ends(start_server: StartServer, tmp_path: Path) -> None:
    """503 `broken` with the last traceback, then exit code 4; what was queued runs next time."""
    marker = tmp_path / "gone"
    source = SOURCE.format(marker=str(marker))
    settings = {"OGPU_CRASH_BUDGET": 3, "OGPU_STATE_DIR": tmp_path / "state"}
    server = start_server(source, **settings)
    marker.touch()
    kill_worker(server)
    wait_until(lambda: server.slot()["last_exit"], "a dead worker")
    assert server.post("echo", "kept", {"text": "kept"}).status_code == 202

    def broken() -> dict[str, object] | None:
        answer = server.http.get("/readyz")
        body: dict[str, object] = answer.json()
        return body if body.get("reason") == "broken" and answer.status_code == 503 else None

    body = wait_until(broken, "broken")
    assert body is not None
    assert "3 starts of workers failed within 60 s" in str(body["detail"])
    assert "RuntimeError: the weights are gone" in str(body["detail"])
    assert server.workers()["state"] == "broken"
    assert server.post("echo", "late").status_code == 503
    assert server.http.get("/healthz").status_code == 200
    assert server.wait_exit() == 4
    assert server.log.count("Init failed in worker") == 3
    marker.unlink()
    again = start_server(source, **settings)
    assert again.wait_state("kept", "succeeded")["attempt"] == 1


def test_what_runs_in_another_worker_ends_first(start_server: StartServer, tmp_path: Path) -> None:
    """One slot cannot be filled: the service gives up, but not the task that runs in the other."""
    marker, go = tmp_path / "gone", tmp_path / "go"
    server = start_server(SOURCE.format(marker=str(marker)), OGPU_WORKERS=2, OGPU_CRASH_BUDGET=2)
    wait_until(lambda: server.slot(1)["state"] == "ready", "both are ready")
    server.post("waits", "runs", {"text": str(go)})
    server.wait_state("runs", "running")
    marker.touch()
    kill_worker(server, 1 - server.task("runs")["worker"]["slot"])
    wait_until(lambda: server.http.get("/readyz").json().get("reason") == "broken", "broken")
    go.touch()
    assert server.wait_state("runs", "succeeded")
    assert server.wait_exit() == 4


def test_failures_that_lie_far_apart_are_borne(start_server: StartServer, tmp_path: Path) -> None:
    """Only so many within OGPU_CRASH_WINDOW end the service; the pauses between tries grow."""
    marker = tmp_path / "gone"
    server = start_server(
        SOURCE.format(marker=str(marker)), OGPU_CRASH_BUDGET=2, OGPU_CRASH_WINDOW=0.05
    )
    marker.touch()
    kill_worker(server)
    wait_until(lambda: server.slot()["generation"] >= 5, "five generations")
    assert server.slot()["last_exit"]["reason"] == "init_failed"
    marker.unlink()
    wait_until(lambda: server.slot()["state"] == "ready", "ready again")
    assert server.run("echo", "a")["state"] == "succeeded"


def test_poison_never_takes_the_budget_with_it(start_server: StartServer, tmp_path: Path) -> None:
    """A task whose worker dies each time fails alone, however often it is sent."""
    server = start_server(SOURCE.format(marker=str(tmp_path / "never")), OGPU_CRASH_BUDGET=2)
    for number in range(8):
        error = server.run("dies", f"poison{number}")["error"]
        assert (error["reason"], error["exit_code"]) == ("worker_died", 7)
    assert server.run("echo", "a", {"text": "on"})["result"]["text"] == "on"
    assert server.slot()["generation"] == 9


def test_idle_workers_that_are_killed_are_replaced(
    start_server: StartServer, tmp_path: Path
) -> None:
    """They had started well: the budget is for starts that fail."""
    server = start_server(SOURCE.format(marker=str(tmp_path / "never")), OGPU_CRASH_BUDGET=2)
    for number in range(5):
        kill_worker(server)
        wait_until(lambda: server.slot()["generation"] == number + 2, "the next one")  # noqa: B023
        assert server.run("echo", f"a{number}")["state"] == "succeeded"
