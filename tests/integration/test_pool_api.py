"""Drain and resume, a full queue and what it answers, tasks that wait too long, and the metrics."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from conftest import StartServer
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until


def hold(server: Server, file: Path, address: str = "hold") -> None:
    """Keep the only worker busy until ``file`` is there."""
    server.post("waits_for_file", address, {"text": str(file)})
    server.wait_state(address, "running")


def retry_after(server: Server, slug: str, address: str = "refused") -> int:
    """POST a task that must be refused; return Retry-After."""
    response = server.post("echo", address)
    assert response.status_code == 503, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == f"urn:ogpu:problem:{slug}"
    assert server.http.get(f"/tasks/{address}").status_code == 404
    return int(response.headers["retry-after"])


def test_drain_and_resume(start_server: StartServer, tmp_path: Path) -> None:
    """New tasks are refused, what was accepted goes on, /readyz and /workers say it; then back."""
    server = start_server()
    hold(server, tmp_path / "go")
    server.post("echo", "queued", {"text": "x"})
    for _ in range(2):  # a second drain changes nothing
        drained = server.http.post("/drain")
        assert drained.status_code == 200
        assert (drained.json()["accepting"], drained.json()["state"]) == (False, "draining")
        assert drained.json()["queue_depth"] == 1
        assert retry_after(server, "not-accepting") >= 1
    ready = server.http.get("/readyz")
    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert int(ready.headers["retry-after"]) >= 1
    assert server.http.get("/healthz").status_code == 200
    # The same task again is no new one: it is joined, as always while it is active.
    assert server.post("echo", "queued", {"text": "x"}).status_code == 202
    (tmp_path / "go").touch()
    assert server.wait_state("queued", "succeeded")["result"]["text"] == "x"
    server.wait_state("hold", "succeeded")
    assert server.workers()["accepting"] is False  # idle, and still not accepting
    assert server.process.poll() is None
    retry_after(server, "not-accepting")
    for _ in range(2):
        resumed = server.http.post("/resume")
        assert resumed.status_code == 200
        assert (resumed.json()["accepting"], resumed.json()["state"]) == (True, "ready")
    assert server.http.get("/readyz").status_code == 200
    assert server.run("echo", "after")["state"] == "succeeded"
    assert server.stop() == 0


def test_a_drained_service_still_stops(start_server: StartServer, tmp_path: Path) -> None:
    """SIGTERM after POST /drain: what runs ends, exit code 0."""
    server = start_server()
    hold(server, tmp_path / "go")
    server.http.post("/drain")
    server.process.terminate()
    server.wait_log("SIGTERM: draining")
    assert server.http.post("/resume").status_code == 409
    (tmp_path / "go").touch()
    assert server.wait_exit() == 0
    assert "Function: `waits_for_file` completed" in server.log


def test_a_full_queue_refuses_before_anything_is_stored(
    start_server: StartServer, tmp_path: Path
) -> None:
    """And Retry-After is the time that the queue will take, by what tasks have taken."""
    server = start_server(OGPU_QUEUE_SIZE=6)
    server.run("echo", "fast")
    answers = []
    for turn in ("quick", "slow"):
        hold(server, tmp_path / turn, f"hold-{turn}")
        for number in range(6):
            assert server.post("echo", f"{turn}{number}").status_code == 202
        answers.append(retry_after(server, "queue-full", f"more-{turn}"))
        (tmp_path / turn).touch()
        server.wait_state(f"{turn}5", "succeeded")
        for number in range(2):
            server.run("sleep", f"s-{turn}{number}", {"number": 2.0})
    quick, slow = answers
    # 2 s each, of which a moving average has seen two; six tasks wait.
    assert quick <= 3
    assert 3 < slow <= 12
    hold(server, tmp_path / "now", "hold-now")
    depths = []
    for number in range(6):
        server.http.post("/drain")
        depths.append(retry_after(server, "not-accepting"))
        server.http.post("/resume")
        server.post("echo", f"now{number}")
    assert depths == sorted(depths)
    assert depths[0] == 1 < depths[-1] - 2
    listed = server.http.get("/tasks?limit=1000").json()["tasks"]
    assert not [t for t in listed if t["task_address"].startswith(("more", "refused"))]
    (tmp_path / "now").touch()
    server.wait_state("now5", "succeeded")


def test_retry_after_counts_the_start_of_a_worker(
    start_server: StartServer, tmp_path: Path
) -> None:
    """With no worker ready: a guess at first, then what a start was seen to take."""
    go = tmp_path / "go"
    server = start_server(
        wait=False, OGPU_BIND="early", OGPU_QUEUE_SIZE=2, ZOO_INIT_WAITS_FOR=go,
        ZOO_INIT_SLEEP_S=2.5,
    ).wait_listening()  # fmt: skip
    starting = server.http.get("/readyz")
    assert (starting.status_code, starting.json()["reason"]) == (503, "starting")
    guess = int(starting.headers["retry-after"])
    assert guess >= 2
    for number in range(2):
        assert server.post("echo", f"q{number}").status_code == 202
    assert retry_after(server, "queue-full") > guess
    go.touch()
    assert server.wait_state("q1", "succeeded")["worker"]["generation"] == 1
    server.wait_ready()
    server.post("unlimited_sleep", "killed", {"number": 60})
    server.wait_state("killed", "running")
    server.http.delete("/tasks/killed")
    restarting = server.http.get("/readyz")
    assert (restarting.status_code, restarting.json()["reason"]) == (503, "starting")
    assert int(restarting.headers["retry-after"]) >= 2  # @init takes 2.5 s
    assert restarting.json()["ready_workers"] == 0


def test_a_task_that_waits_too_long_expires(start_server: StartServer, tmp_path: Path) -> None:
    """State and reason say so, it never runs, and one that is taken in time is not touched."""
    server = start_server(OGPU_QUEUE_TIMEOUT=0.4)
    hold(server, tmp_path / "go")
    ran = tmp_path / "ran"
    server.post("facts", "late", {"text": f"open({str(ran)!r}, 'w').close()"})
    late = server.wait_state("late", "expired", timeout_s=5)
    assert late["error"]["reason"] == "expired"
    assert "OGPU_QUEUE_TIMEOUT" in late["error"]["message"]
    assert (late["worker"], late["started_at"]) == (None, None)
    assert server.workers()["queue_depth"] == 0
    assert server.http.delete("/tasks/late").status_code == 409
    assert server.task("hold")["state"] == "running"  # for longer than the queue's limit
    (tmp_path / "go").touch()
    assert server.run("echo", "next")["state"] == "succeeded"
    assert not ran.exists()
    waited = server.http.post("/run/echo/again", json={}, headers={"prefer": "wait=5"})
    assert waited.json()["state"] == "succeeded"


def seconds(moment: str) -> float:
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()


def test_the_time_of_before_a_restart_counts(start_server: StartServer, tmp_path: Path) -> None:
    """What waited too long over a restart expires at once, though a worker is free; none runs."""
    early = {"OGPU_BIND": "early", "OGPU_STATE_DIR": tmp_path / "kept"}
    server = start_server(wait=False, ZOO_INIT_WAITS_FOR=tmp_path / "never", **early)
    server.wait_listening()
    ran = tmp_path / "ran"
    for number in range(5):
        body = {"text": f"open({str(ran)!r}, 'a').write('{number}')"}
        assert server.post("facts", f"late{number}", body).status_code == 202
    accepted = seconds(server.task("late4")["accepted_at"])
    assert server.stop() == 0
    wait_until(lambda: time.time() > accepted + 0.5, "the time is over")
    again = start_server(OGPU_QUEUE_TIMEOUT=0.5, **early)
    for number in range(5):
        wait_until(
            lambda n=number: again.task(f"late{n}")["finished_at"], "each has ended", timeout_s=5
        )
    tasks = [again.task(f"late{number}") for number in range(5)]
    assert [(t["state"], t["worker"]) for t in tasks] == [("expired", None)] * 5
    assert not ran.exists(), f"these ran: {ran.read_text()}"
    assert again.run("echo", "fresh")["state"] == "succeeded"


def test_what_is_left_of_the_time_is_what_counts(start_server: StartServer, tmp_path: Path) -> None:
    """A task with time left at a restart does not get all of it again."""
    settings = {
        "OGPU_BIND": "early", "OGPU_STATE_DIR": tmp_path / "kept", "OGPU_QUEUE_TIMEOUT": 4,
        "ZOO_INIT_WAITS_FOR": tmp_path / "never",
    }  # fmt: skip
    server = start_server(wait=False, **settings).wait_listening()
    assert server.post("echo", "a").status_code == 202
    assert server.stop() == 0
    again = start_server(wait=False, **settings).wait_listening()
    up = time.time()
    task = again.wait_state("a", "expired", timeout_s=8)
    waited = seconds(task["finished_at"]) - seconds(task["accepted_at"])
    latest = max(4.0, up - seconds(task["accepted_at"]))
    assert 3.9 < waited < latest + 0.7, (waited, latest)


HISTOGRAMS = {
    "ogpu_batch_size", "ogpu_task_queue_seconds", "ogpu_task_run_seconds", "ogpu_init_seconds",
    "ogpu_journal_commit_seconds", "ogpu_loop_lag_seconds",
}  # fmt: skip
COUNTERS = {"ogpu_tasks", "ogpu_worker_restarts", "ogpu_callback_attempts"}
GAUGES = {"ogpu_queue_depth", "ogpu_workers", "ogpu_callbacks_pending"}


def families(server: Server) -> dict[str, Metric]:
    response = server.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def value(found: dict[str, Metric], sample: str, **labels: str) -> float:
    """Return one sample's value, 0 where there is none with such labels."""
    samples = [s for family in found.values() for s in family.samples if s.name == sample]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


def test_every_metric_is_there_and_tells_the_truth(
    start_server: StartServer, sink: Sink, tmp_path: Path
) -> None:
    """After successes, a failure, a kill, a callback that was refused, and with a queue."""
    sink.answers[:] = [500, 200]
    server = start_server(CALLBACK_URL=sink.url)
    for number in range(3):
        server.run("echo", f"good{number}")
    server.run("raises", "bad")
    server.run("hangs_asleep", "late")
    server.run("sleep", "slow", {"number": 0.3})
    sink.wait_for(5)
    wait_until(lambda: value(families(server), "ogpu_callbacks_pending") == 0, "all delivered")
    sink.hold.clear()
    server.run("echo", "held")
    hold(server, tmp_path / "go")
    server.post("echo", "queued")
    found = families(server)
    for names, kind in ((HISTOGRAMS, "histogram"), (COUNTERS, "counter"), (GAUGES, "gauge")):
        for name in names:
            assert found[name].type == kind
            assert found[name].documentation
    assert {name for name in found if name.startswith("ogpu_")} == HISTOGRAMS | COUNTERS | GAUGES

    def count(sample: str, **labels: str) -> float:
        return value(found, sample, **labels)

    assert count("ogpu_tasks_total", function="echo", state="succeeded", reason="") == 4
    assert count("ogpu_tasks_total", function="raises", state="failed", reason="exception") == 1
    assert count("ogpu_tasks_total", state="timed_out", reason="timed_out") == 1
    assert count("ogpu_tasks_total") == 7
    assert count("ogpu_queue_depth") == 1
    assert count("ogpu_task_queue_seconds_count") == 8  # with the one that runs
    assert count("ogpu_task_run_seconds_count", function="echo") == 4
    assert 0.3 <= count("ogpu_task_run_seconds_sum", function="sleep") < 5
    assert 0.3 <= count("ogpu_task_run_seconds_sum", function="hangs_asleep") < 5
    assert count("ogpu_workers", state="busy") == count("ogpu_workers") == 1
    assert {s.labels["state"] for s in found["ogpu_workers"].samples} >= {"ready", "starting"}
    assert count("ogpu_worker_restarts_total", reason="timed_out") == 1
    assert count("ogpu_worker_restarts_total") == 1
    assert count("ogpu_init_seconds_count") == 2
    assert count("ogpu_callback_attempts_total", outcome="delivered") == 4
    assert count("ogpu_callback_attempts_total", outcome="refused") == 1
    assert count("ogpu_callbacks_pending") == 1
    assert count("ogpu_journal_commit_seconds_count") >= 7
    assert 0 < count("ogpu_journal_commit_seconds_sum") < 30
    assert count("ogpu_loop_lag_seconds_count") >= 2
    (tmp_path / "go").touch()
    sink.hold.set()
    wait_until(lambda: value(families(server), "ogpu_callbacks_pending") == 0, "delivered")
    assert value(families(server), "ogpu_queue_depth") == 0


def test_buckets_reach_from_milliseconds_to_hours(start_server: StartServer) -> None:
    server = start_server()
    server.run("echo", "a")
    found = families(server)
    for name in ("ogpu_task_run_seconds", "ogpu_task_queue_seconds", "ogpu_init_seconds"):
        buckets = (s for s in found[name].samples if s.name == f"{name}_bucket")
        bounds = sorted({float(s.labels["le"]) for s in buckets})
        assert bounds[0] <= 0.005
        assert bounds[-2] >= 3600
        assert bounds[-1] == float("inf")
