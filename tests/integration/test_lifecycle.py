"""From the start to the end of the service: init, ports, readiness, drain, death of the front."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import httpx
import pytest

from conftest import StartServer
from support.processes import descendants, is_gone
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until


def refuses_connections(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def ppid(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# --- init


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_init_that_fails_at_first_start_ends_the_program(
    start_server: StartServer, method: str
) -> None:
    """The traceback in the log, exit code 3, no port open, no process left (the fixture)."""
    port = free_port()
    server = start_server(
        wait=False, ZOO_INIT_RAISES=1, OGPU_PORT=port, OGPU_START_METHOD=method, OGPU_WORKERS=2
    )
    assert server.wait_exit() == 3
    assert "RuntimeError: the model file is missing" in server.log
    assert "CRITICAL    the first worker did not become ready: its @init failed" in server.log
    assert "Logging error" not in server.log
    assert "Listening" not in server.log
    assert refuses_connections(port)


def test_an_init_that_dies_at_first_start_ends_the_program(start_server: StartServer) -> None:
    source = """
import os, ogpu.service
@ogpu.service.init()
def load(): os._exit(9)
ogpu.service.start()
"""
    server = start_server(source, wait=False)
    assert server.wait_exit() == 3
    assert "exited with code 9" in server.log


def test_an_init_that_fails_after_a_kill_is_tried_again(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Back-off and another try; the task waits meanwhile, and runs."""
    marker = tmp_path / "fail-once"
    server = start_server(ZOO_INIT_FAILS_AFTER_FIRST=marker)
    marker.touch()
    server.post("hangs_asleep", "hung")
    assert server.run("echo", "after")["state"] == "succeeded"
    assert "init fails this once" in server.log
    assert "Slot 0: next try in" in server.log
    assert server.slot()["generation"] == 3
    assert server.slot()["last_exit"]["reason"] == "init_failed"


def test_the_first_init_runs_alone_then_the_others(
    start_server: StartServer, tmp_path: Path
) -> None:
    order = tmp_path / "order"
    server = start_server(OGPU_WORKERS=3, ZOO_INIT_LOG=order)
    wait_until(lambda: all(w["state"] == "ready" for w in server.workers()["workers"]), "3 ready")
    times = [(line.split()[0], float(line.split()[1])) for line in order.read_text().splitlines()]
    begins = sorted(at for what, at in times if what == "begin")
    ends = sorted(at for what, at in times if what == "end")
    assert begins[1] > ends[0]
    assert begins[2] < ends[1]


def test_async_init_runs_in_the_loop_of_the_handlers(start_server: StartServer) -> None:
    source = """
import asyncio, ogpu.service
from pydantic import BaseModel
class Model(BaseModel):
    ticks: int = 0
ticks = 0
async def tick():
    global ticks
    while True:
        ticks += 1
        await asyncio.sleep(0.01)
@ogpu.service.init()
async def load():
    global task
    task = asyncio.create_task(tick())
@ogpu.service.expose()
def count(data: Model) -> Model:
    return Model(ticks=ticks)
ogpu.service.start()
"""
    server = start_server(source)
    first = server.run("count", "a")["result"]["ticks"]
    numbers = iter(range(10_000))
    wait_until(
        lambda: server.run("count", f"t{next(numbers)}")["result"]["ticks"] > first + 5,
        "background tasks of the source run on between its tasks",
    )


# --- ports and readiness


def test_bind_ready_opens_the_port_when_the_first_worker_is_ready(
    start_server: StartServer, tmp_path: Path
) -> None:
    port = free_port()
    go_on = tmp_path / "go on"
    server = start_server(wait=False, OGPU_PORT=port, ZOO_INIT_WAITS_FOR=go_on)
    server.wait_log("CALLBACK_URL is not set")  # the front has imported all that it needs
    assert refuses_connections(port)
    go_on.touch()
    server.wait_ready()
    assert server.log.index("Worker 0 is ready") < server.log.index("Listening on")


def test_bind_early_opens_the_port_at_once_and_queues(
    start_server: StartServer, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    server = start_server(wait=False, OGPU_BIND="early", ZOO_INIT_WAITS_FOR=go_on)
    server.wait_listening()
    ready = server.http.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["reason"] == "starting"
    assert ready.headers["retry-after"].isdigit()
    assert server.http.get("/healthz").status_code == 200
    pool = server.workers()
    assert (pool["state"], pool["accepting"], pool["workers"][0]["state"]) == (
        "starting", True, "starting",
    )  # fmt: skip
    assert server.post("echo", "early").status_code == 202
    assert server.task("early")["state"] == "queued"
    assert server.workers()["queue_depth"] == 1
    go_on.touch()
    server.wait_state("early", "succeeded")
    assert server.wait_ready().http.get("/readyz").json()["status"] == "ready"


def test_readiness_follows_the_workers(start_server: StartServer) -> None:
    """Not ready while the only worker is being replaced."""
    server = start_server(ZOO_INIT_SLEEP_S=0.5)
    server.post("hangs_asleep", "hung")
    wait_until(lambda: server.http.get("/readyz").status_code == 503, "not ready")
    assert server.http.get("/healthz").json() == {"status": "alive"}
    wait_until(lambda: server.http.get("/readyz").status_code == 200, "ready again")


def test_a_slot_is_described_as_the_design_says(start_server: StartServer) -> None:
    server = start_server()
    server.post("unlimited_sleep", "busy", {"number": 60})
    server.wait_state("busy", "running")
    pool = server.workers()
    assert set(pool) == {"workers", "queue_depth", "accepting", "state"}
    slot = pool["workers"][0]
    assert set(slot) == {
        "slot", "generation", "state", "pid", "device", "task_address", "function", "tasks_done",
        "rss_bytes", "started_at", "last_exit",
    }  # fmt: skip
    assert (slot["state"], slot["task_address"], slot["function"]) == (
        "busy", "busy", "unlimited_sleep",
    )  # fmt: skip
    assert slot["rss_bytes"] > 1_000_000


def test_a_port_in_use_is_an_error_before_init(start_server: StartServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start_server(wait=False, OGPU_PORT=port, ZOO_INIT_SLEEP_S=30)
        assert server.wait_exit() == 2
    assert f"cannot listen on 127.0.0.1:{port}" in server.log
    assert "OGPU_PORT" in server.log


def test_an_invalid_setting_ends_the_program_before_anything_starts(
    start_server: StartServer,
) -> None:
    server = start_server(wait=False, OGPU_WORKERS="0")
    assert server.wait_exit() == 2
    assert "OGPU_WORKERS='0'" in server.log
    assert "Traceback" not in server.log.split("invalid settings")[0]
    assert "template" not in server.log


def test_start_takes_overrides(start_server: StartServer) -> None:
    port = free_port()
    source = f"import ogpu.service\nogpu.service.start(port={port}, workers=2)\n"
    server = start_server(source, OGPU_PORT=1, OGPU_WORKERS=1)
    assert server.url.endswith(f":{port}")
    assert len(server.workers()["workers"]) == 2


# --- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_running_tasks_end(
    start_server: StartServer, sink: Sink, tmp_path: Path, number: signal.Signals
) -> None:
    """Not ready, 503 for new tasks, the running one ends and its callback goes out, exit 0."""
    server = start_server(CALLBACK_URL=sink.url)
    go_on = tmp_path / "go on"
    server.post("waits_for_file", "running", {"text": str(go_on)})
    server.wait_state("running", "running")
    server.process.send_signal(number)
    server.wait_log("draining")
    refused = server.post("echo", "late")
    assert refused.status_code == 503
    assert refused.headers["retry-after"].isdigit()
    ready = server.http.get("/readyz")
    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert server.workers()["state"] == "draining"
    go_on.touch()
    assert server.wait_exit() == 0
    assert [d.json["text"] for d in sink.deliveries] == [str(go_on)]


def test_start_returns_at_the_end_of_a_drain(start_server: StartServer) -> None:
    source = "import ogpu.service\nogpu.service.start()\nprint('start() has returned')\n"
    server = start_server(source)
    assert server.stop() == 0
    assert server.log.count("start() has returned") == 1


def test_a_task_that_outlasts_the_drain_is_killed(start_server: StartServer) -> None:
    """Without a journal on disk it is lost, and the log says so."""
    server = start_server(OGPU_DRAIN_TIMEOUT=0.5, OGPU_STATE_DIR=":memory:")
    server.post("unlimited_sleep", "endless", {"number": 3600})
    pid = server.wait_state("endless", "running")["worker"]["pid"]
    assert server.stop() == 0
    assert is_gone(pid)
    assert "1 task(s) did not end within 0.5 s" in server.log
    assert "[endless] `unlimited_sleep` is lost: it was queued" in server.log


def test_a_drain_in_memory_ends_when_nothing_waits_any_more(start_server: StartServer) -> None:
    """Also when the last task that waited was cancelled, and none was answered."""
    server = start_server(OGPU_STATE_DIR=":memory:", OGPU_DRAIN_TIMEOUT=60)
    for address in ("running", "waiting"):
        server.post("unlimited_sleep", address, {"number": 3600})
    server.wait_state("running", "running")
    server.process.send_signal(signal.SIGTERM)
    server.wait_log("draining")
    assert server.http.delete("/tasks/waiting").status_code == 200
    assert server.http.delete("/tasks/running").status_code == 200
    assert server.wait_exit(timeout_s=15) == 0


def test_a_waiting_client_is_answered_at_the_end(start_server: StartServer) -> None:
    """A request that waits for a task that is cut short gets its 202, not a broken connection."""
    server = start_server(OGPU_DRAIN_TIMEOUT=0.3)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            httpx.post,
            f"{server.url}/run/unlimited_sleep/a",
            json={"number": 3600},
            headers={"Prefer": "wait=60"},
            timeout=30,
        )
        server.wait_state("a", "running")
        assert server.stop() == 0
        assert waiting.result().status_code == 202


def test_a_second_signal_stops_at_once(start_server: StartServer) -> None:
    server = start_server(OGPU_DRAIN_TIMEOUT=60)
    server.post("unlimited_sleep", "endless", {"number": 3600})
    server.wait_state("endless", "running")
    server.process.send_signal(signal.SIGTERM)
    server.wait_log("draining")
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit(timeout_s=10) == 0
    assert "stopping at once" in server.log


@pytest.mark.parametrize("moment", ["Starting OpenGPU", "Workers are made", "CALLBACK_URL is not"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_stop_signal_while_starting_ends_it(
    start_server: StartServer, method: str, moment: str
) -> None:
    """At any moment after start(): as PID 1 a signal that nobody handles would be lost."""
    server = start_server(wait=False, ZOO_INIT_SLEEP_S=60, OGPU_START_METHOD=method)
    server.wait_log(moment)
    assert server.stop(timeout_s=10) == 0


def everything_of(server: Server) -> list[int]:
    return [process.pid for process in descendants()]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_nothing_outlives_the_front(
    start_server: StartServer, tmp_path: Path, method: str, number: signal.Signals
) -> None:
    """Whatever kills the front, the template, busy workers and their children end with it."""
    server = start_server(OGPU_START_METHOD=method, OGPU_WORKERS=2)
    pids = tmp_path / "pids"
    server.post("unlimited_sleep", "busy", {"number": 3600})
    server.post("hangs_with_family", "family", {"text": str(pids)})
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 4, "children started")
    everything = everything_of(server)
    assert len(everything) >= 4 + 4
    os.kill(server.process.pid, number)
    server.wait_exit()
    wait_until(lambda: all(map(is_gone, everything)), "nothing left", timeout_s=5)
