"""Batches: tasks of one function are run together, and each is a task of its own all the same."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until


@pytest.fixture
def go(tmp_path: Path) -> Path:
    return tmp_path / "go"


@pytest.fixture
def server(start_server: StartServer, sink: Sink, go: Path) -> Server:
    return start_server("batches.py", CALLBACK_URL=sink.url, TEST_GO=go)


def run_together(
    server: Server, go: Path, texts: list[str], function: str = "together"
) -> list[dict[str, Any]]:
    """Have tasks wait behind another one, so that they are run in one batch; return their ends."""
    go.unlink(missing_ok=True)
    assert server.post("blocks", f"gate-{len(texts)}-{texts[0]}").status_code == 202
    wait_until(lambda: server.slot()["function"] == "blocks", "the worker is busy")
    addresses = [f"{text}-{number}" for number, text in enumerate(texts)]
    for address, text in zip(addresses, texts, strict=True):
        assert server.post(function, address, {"text": text}).status_code == 202
    go.touch()
    return [ended(server, address) for address in addresses]


def begin_together(server: Server, count: int) -> None:
    """Have tasks t0, t1, … run in one batch, until the file is there, or they are killed."""
    server.post("blocks", "gate")
    wait_until(lambda: server.slot()["function"] == "blocks", "the worker is busy")
    for number in range(count):
        server.post("together", f"t{number}", {"text": "progress"})
    server.http.delete("/tasks/gate")  # and so the worker is another one
    wait_until(lambda: server.task("t0")["progress"], "they run")


def ended(server: Server, address: str) -> dict[str, Any]:
    over = ("succeeded", "failed", "timed_out", "cancelled")

    def look() -> dict[str, Any] | None:
        task = server.task(address)
        return task if task["state"] in over else None

    found = wait_until(look, f"{address} has ended")
    assert found is not None
    return found


def test_what_waits_is_run_together_and_each_keeps_what_is_its_own(
    server: Server, sink: Sink, go: Path
) -> None:
    """Address, result, callback, worker; in order; a full batch does not wait for its window."""
    tasks = run_together(server, go, ["a", "b", "c", "d", "e"])
    assert [task["state"] for task in tasks] == ["succeeded"] * 5
    assert [task["result"]["text"] for task in tasks] == ["a", "b", "c", "d", "e"]
    assert [task["result"]["size"] for task in tasks] == [4, 4, 4, 4, 1]
    together = [f"{text}-{number}" for number, text in enumerate("abcd")]
    assert tasks[0]["result"]["addresses"] == together
    assert {task["attempt"] for task in tasks} == {1}
    assert len({task["started_at"] for task in tasks[:4]}) == 1
    sink.wait_for(6)  # with the one that held them up
    delivered = {d.address: d.json for d in sink.deliveries}
    assert {a: delivered[a]["text"] for a in together} == dict(zip(together, "abcd", strict=True))
    logs = server.http.get("/tasks/b-1/logs").text
    assert "together: a b c d" in logs


def test_a_full_batch_waits_for_nobody_and_a_part_of_one_for_its_window(
    start_server: StartServer,
) -> None:
    """Three of three run at once, with a window of 30 s; meanwhile other functions have the worker.

    One alone runs when its window of 0.05 s has closed.
    """
    server = start_server("batches.py")
    assert server.post("patient", "p0", {"text": "0"}).status_code == 202
    assert server.run("plain", "meanwhile", {"text": "x"})["state"] == "succeeded"
    assert server.run("together", "alone", {"text": "x"})["result"]["size"] == 1
    assert server.task("p0")["state"] == "queued"
    assert server.post("patient", "p1", {"text": "1"}).status_code == 202
    assert server.run("patient", "p2", {"text": "2"})["result"]["size"] == 3
    assert server.task("p0")["result"]["text"] == "0"


def test_a_full_queue_waits_for_nobody(start_server: StartServer) -> None:
    """Where no more may wait (OGPU_QUEUE_SIZE), what waits is run together at once."""
    server = start_server("batches.py", OGPU_QUEUE_SIZE=2)
    assert server.post("patient", "p0", {"text": "0"}).status_code == 202
    assert server.run("patient", "p1", {"text": "1"})["result"]["size"] == 2


def test_one_result_fails_its_own_task(server: Server, go: Path) -> None:
    """An exception instance, and a result of another type; the others have theirs."""
    good, fails, wrong, last = run_together(server, go, ["good", "fail", "wrong", "last"])
    assert (good["state"], last["state"]) == ("succeeded", "succeeded")
    assert good["result"]["size"] == 4
    error = fails["error"]
    assert (error["reason"], error["exception"], error["message"]) == (
        "exception", "ValueError", "this one",
    )  # fmt: skip
    assert wrong["error"]["reason"] == "invalid_output"
    assert "returned a Plain; Output was declared" in wrong["error"]["message"]
    assert "together: good fail wrong last" in error["output"]


def test_an_input_that_does_not_fit_in_the_worker_fails_its_own_task(
    server: Server, go: Path
) -> None:
    """Whatever its validator raises there; the worker and the rest of the batch go on."""
    first, unfit, last = run_together(server, go, ["first", "unfit", "last"])
    assert [task["result"]["size"] for task in (first, last)] == [2, 2]
    assert (first["attempt"], first["state"], last["state"]) == (1, "succeeded", "succeeded")
    assert (unfit["error"]["reason"], unfit["error"]["exception"]) == ("exception", "KeyError")


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ("raise", "exception", "the batch"),
        ("short", "invalid_output", "returned 0 results for a batch of 3 inputs"),
        ("number", "invalid_output", "has a batch_size and returned a int"),
        ("current_task", "exception", "current_tasks()"),
    ],
)
def test_what_concerns_the_batch_fails_all_of_it(
    server: Server, go: Path, text: str, reason: str, message: str
) -> None:
    tasks = run_together(server, go, ["one", text, "three"])
    for task in tasks:
        assert (task["state"], task["error"]["reason"]) == ("failed", reason)
        assert message in task["error"]["message"]
    # Put into words once: with 1,024 tasks a deep recursion would take half a minute.
    assert len({task["error"]["message"] for task in tasks}) == 1
    assert server.run("plain", "next")["state"] == "succeeded"


def test_only_the_guilty_one_fails_when_a_batch_kills_its_worker(server: Server, go: Path) -> None:
    """The others run again, each alone, as another attempt; later tasks are batched again."""
    tasks = run_together(server, go, ["one", "two", "kill", "four"])
    assert [task["state"] for task in tasks] == ["succeeded", "succeeded", "failed", "succeeded"]
    assert [task["attempt"] for task in tasks] == [2, 2, 2, 2]
    assert [task["result"]["size"] for task in tasks if task["result"]] == [1, 1, 1]
    assert tasks[2]["error"]["reason"] == "worker_died"
    assert tasks[2]["error"]["signal"] == 9
    again = run_together(server, go, ["five", "six"])
    assert [task["result"]["size"] for task in again] == [2, 2]


def test_the_deadline_is_that_of_the_batch(server: Server, go: Path) -> None:
    """All have timed out, with the stack; with a grace they are asked together, in vain or not."""
    for task in run_together(server, go, ["a", "b"], "hangs"):
        assert task["state"] == "timed_out"
        assert "in hangs" in task["error"]["stack"]
    in_handler = run_together(server, go, ["c", "d"], "stops")
    in_validator = run_together(server, go, ["e", "slow"], "stops")
    for task in in_handler + in_validator:
        assert task["state"] == "timed_out"
        assert task["error"]["message"].endswith("it was asked to stop, and did")
    pid = in_handler[0]["worker"]["pid"]
    assert server.run("together", "after", {"text": "x"})["result"]["pid"] == pid  # it was spared


def test_a_cancelled_task_leaves_its_batch_and_the_others_run_again(
    server: Server, go: Path
) -> None:
    """They have another attempt, and lose nothing. Progress is each task's own."""
    begin_together(server, 3)
    assert server.task("t0")["progress"]["message"] == "half of t0"
    assert server.task("t1")["progress"] is None
    assert server.slot()["task_address"] == "t0"
    assert server.http.delete("/tasks/t1").json()["state"] == "cancelled"
    go.touch()
    kept = [ended(server, "t0"), ended(server, "t2")]
    assert [(task["state"], task["attempt"]) for task in kept] == [("succeeded", 2)] * 2
    assert server.task("t1")["state"] == "cancelled"


def test_past_the_deadline_a_cancel_has_nothing_run_again(server: Server, go: Path) -> None:
    """In the grace: one is cancelled; the others have timed out, as if nobody had."""
    go.touch()
    for number in range(3):
        server.post("ignores", f"t{number}")
    wait_until(lambda: "asked" in server.http.get("/tasks/t2/logs").text, "they are asked")
    assert server.http.delete("/tasks/t1").json()["state"] == "cancelled"
    others = [server.task("t0"), server.task("t2")]
    assert [(task["state"], task["attempt"]) for task in others] == [("timed_out", 1)] * 2


def test_several_cancels_of_a_batch_cost_one_worker(start_server: StartServer, go: Path) -> None:
    """All that arrive before it is dead: none of them runs again, elsewhere, to be killed there."""
    server = start_server("batches.py", OGPU_WORKERS=2, TEST_GO=go)
    wait_until(lambda: {s["state"] for s in server.workers()["workers"]} == {"ready"}, "two")
    for address in ("t0", "t1", "t2"):
        server.post("together", address, {"text": "progress"})
    wait_until(lambda: server.task("t2")["state"] == "running", "their window has closed")
    port = server.http.base_url.port
    with contextlib.ExitStack() as stack:
        server.process.send_signal(signal.SIGSTOP)
        for address in ("t0", "t1"):  # so that they arrive at once
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            path = f"/tasks/{address}?function=together"
            client.sendall(f"DELETE {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
        server.process.send_signal(signal.SIGCONT)
        assert [ended(server, a)["state"] for a in ("t0", "t1")] == ["cancelled"] * 2
    go.touch()
    kept = ended(server, "t2")
    assert (kept["state"], kept["attempt"]) == ("succeeded", 2)
    restarts = 'ogpu_worker_restarts_total{reason="cancelled"} 1.0'
    wait_until(lambda: restarts in server.http.get("/metrics").text, "one worker", 5)


def test_a_cancel_spares_nobody_of_a_batch_that_has_killed_its_worker(
    server: Server, go: Path
) -> None:
    """It comes while the worker is dying: the others run again, each alone, as without it."""
    for number in range(3):
        server.post("together", f"t{number}", {"text": "progress"})
    wait_until(lambda: server.task("t0")["progress"], "progress")
    match = re.search(r"template: pid (\d+)", server.log)
    assert match
    template = int(match[1])
    os.kill(template, signal.SIGSTOP)  # so that it does not tell that the worker is gone
    try:
        os.kill(server.slot()["pid"], signal.SIGKILL)
        wait_until(lambda: server.slot()["state"] == "stopping", "its death")
        assert server.http.delete("/tasks/t1").json()["state"] == "cancelled"
        go.touch()
    finally:
        os.kill(template, signal.SIGCONT)
    others = [ended(server, "t0"), ended(server, "t2")]
    assert [(task["result"]["size"], task["attempt"]) for task in others] == [(1, 2)] * 2


def test_a_batch_that_the_front_left_runs_again(
    start_server: StartServer, go: Path, tmp_path: Path
) -> None:
    """A SIGKILL of the front in the middle: each task of it is kept, and ends."""
    settings = {"TEST_GO": str(go), "OGPU_STATE_DIR": str(tmp_path / "state")}
    server = start_server("batches.py", **settings)
    begin_together(server, 2)
    server.process.kill()
    server.wait_exit()
    go.touch()
    server = start_server("batches.py", **settings)
    tasks = [ended(server, f"t{number}") for number in range(2)]
    assert [(task["state"], task["attempt"]) for task in tasks] == [("succeeded", 2)] * 2


def test_only_the_guilty_one_fails_when_a_batch_kills_the_front(
    start_server: StartServer, tmp_path: Path
) -> None:
    """As a container that is out of memory does: the others use up no more than one attempt."""
    settings = {"OGPU_STATE_DIR": str(tmp_path / "state"), "OGPU_MAX_ATTEMPTS": 2}
    server = start_server("batches.py", **settings)
    for number, text in enumerate(["fine", "kill_the_front", "fine"]):
        server.post("together", f"t{number}", {"text": text})
    server.wait_exit()
    server = start_server("batches.py", wait=False, **settings)
    server.wait_exit()
    server = start_server("batches.py", **settings)
    tasks = [ended(server, f"t{number}") for number in range(3)]
    assert [task["state"] for task in tasks] == ["succeeded", "failed", "succeeded"]
    assert tasks[1]["error"]["reason"] == "interrupted"


def test_a_task_does_not_expire_while_it_waits_for_others(start_server: StartServer) -> None:
    """A window of 30 s, an OGPU_QUEUE_TIMEOUT of 1 s, and a worker that is free."""
    server = start_server("batches.py", OGPU_QUEUE_TIMEOUT=1)
    assert server.run("patient", "p0", {"text": "0"})["state"] == "succeeded"


def test_a_drain_waits_for_nobody_who_might_join_a_batch(
    start_server: StartServer, sink: Sink
) -> None:
    """In memory, where what waits at the end is lost: a task in a window of 30 s runs at once."""
    server = start_server(
        "batches.py", OGPU_STATE_DIR=":memory:", OGPU_DRAIN_TIMEOUT=10, CALLBACK_URL=sink.url
    )
    server.post("patient", "p0", {"text": "0"})
    assert server.stop(timeout_s=5) == 0
    assert sink.wait_for(1)[0].json["size"] == 1


def test_the_innocent_have_their_results_whatever_else_is_in_their_batches(
    start_server: StartServer, sink: Sink
) -> None:
    """Forty tasks at once for two workers, some of which kill theirs: each ends once, and right."""
    server = start_server("batches.py", CALLBACK_URL=sink.url, OGPU_WORKERS=2)
    texts = random.Random(7).choices(["good", "fail", "kill"], [6, 2, 1], k=40)
    for number, text in enumerate(texts):
        assert server.post("together", f"t{number}", {"text": text}).status_code == 202
    tasks = [ended(server, f"t{number}") for number in range(len(texts))]
    reasons = {"good": None, "fail": "exception", "kill": "worker_died"}
    found = [task["error"] and task["error"]["reason"] for task in tasks]
    assert found == [reasons[text] for text in texts]
    sink.wait_for(texts.count("good"))
    assert len({d.address for d in sink.deliveries}) == len(sink.deliveries) == texts.count("good")


def test_batches_are_counted(server: Server, go: Path) -> None:
    """`ogpu_batch_size` in /metrics: how many tasks ran together, by function."""
    run_together(server, go, ["a", "b", "c"])
    text = server.http.get("/metrics").text
    assert 'ogpu_batch_size_sum{function="together"} 3.0' in text
    assert 'ogpu_batch_size_count{function="together"} 1.0' in text
    assert 'function="blocks"' not in text.partition("ogpu_batch_size")[2].partition("# HELP")[0]
