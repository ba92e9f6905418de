"""Workers that are replaced between two tasks: when, why, and at nobody's cost."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import StartServer
from support.processes import is_gone
from support.server import Server
from support.waiting import wait_until

MIB = 1024 * 1024
# A worker of the test's source has about 50 MiB, and twice that with a child of its own.
LIMIT = 250 * MIB
LEAK = 300 * MIB


def restarts(server: Server, reason: str) -> float:
    """Return how many workers have been replaced for a reason, by /metrics."""
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == "ogpu_worker_restarts_total" and sample.labels["reason"] == reason:
                return sample.value
    return 0


def wait_replaced(server: Server, pid: int, reason: str) -> None:
    """Wait until another worker is ready in the place of one that was replaced for a reason."""

    def is_replaced() -> bool:
        slot = server.slot()
        return bool(slot["state"] == "ready" and slot["pid"] != pid)

    wait_until(is_replaced, "the worker is replaced")
    assert server.slot()["last_exit"]["reason"] == reason
    assert is_gone(pid)
    assert server.slot()["generation"] == 2
    wait_until(lambda: restarts(server, reason) == 1, f"one restart for {reason}")


def test_a_worker_has_its_share_of_tasks(start_server: StartServer) -> None:
    """OGPU_MAX_TASKS_PER_WORKER, give or take a tenth; then another one goes on."""
    server = start_server("leaky.py", OGPU_MAX_TASKS_PER_WORKER=20)
    tasks = [server.run("who", f"t{number}") for number in range(100)]
    assert {task["state"] for task in tasks} == {"succeeded"}
    shares = [len(list(group)) for _, group in groupby(task["result"]["pid"] for task in tasks)]
    assert all(18 <= share <= 22 for share in shares[:-1]), shares
    assert len(shares) >= 5
    # The last task may have been the last of its worker, too.
    generation = wait_until(
        lambda: server.slot()["state"] == "ready" and server.slot()["generation"], "it is ready"
    )
    assert generation in (len(shares), len(shares) + 1)
    assert server.slot()["last_exit"]["reason"] == "max_tasks"
    assert restarts(server, "max_tasks") == generation - 1


def test_two_slots_are_not_emptied_at_once(start_server: StartServer) -> None:
    """Under load, with an @init that takes its time: one is there always, and no task is lost."""
    server = start_server(
        "leaky.py", OGPU_WORKERS=2, OGPU_MAX_TASKS_PER_WORKER=10, LEAKY_INIT_SLEEP_S=0.1
    )
    wait_until(lambda: [s["state"] for s in server.workers()["workers"]] == ["ready"] * 2, "both")
    samples: list[list[str]] = []
    over = threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            while not over.wait(0.002):
                slots = client.get("/workers").json()["workers"]
                samples.append([slot["state"] for slot in slots])

    def send(number: int) -> str:
        return str(server.run("who", f"t{number}")["state"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            # While one slot is filled, the other may do hundreds.
            states, slots = list[str](), server.workers()["workers"]
            while len(states) < 6000 and not all(slot["generation"] >= 2 for slot in slots):
                states += pool.map(send, range(len(states), len(states) + 120))
                slots = server.workers()["workers"]
    finally:
        over.set()
        watcher.join()
    assert set(states) == {"succeeded"}
    at_work = [sum(state in ("ready", "busy") for state in sample) for sample in samples]
    assert min(at_work) == 1  # it was seen while a worker was replaced, and never while both were
    assert all(slot["generation"] >= 2 for slot in slots), slots
    assert {slot["last_exit"]["reason"] for slot in slots} == {"max_tasks"}


@pytest.mark.parametrize("function", ["leaks", "leaks_in_a_child", "leaks_and_fails"])
def test_a_worker_that_has_grown_too_large_is_replaced(
    start_server: StartServer, function: str
) -> None:
    """OGPU_MAX_WORKER_RSS_BYTES is for all that it has started, whatever became of the task."""
    server = start_server("leaky.py", OGPU_MAX_WORKER_RSS_BYTES=LIMIT)
    task = server.run(function, "t", {"number": LEAK})
    assert task["state"] == ("failed" if function == "leaks_and_fails" else "succeeded")
    wait_replaced(server, task["worker"]["pid"], "max_rss")
    assert f"OGPU_MAX_WORKER_RSS_BYTES allows {LIMIT}" in server.log


def test_a_leak_is_noticed_later_as_well(start_server: StartServer) -> None:
    """A worker that is well is kept; one that leaks in a later task is not, for long."""
    server = start_server("leaky.py", OGPU_MAX_WORKER_RSS_BYTES=LIMIT)
    pids = {server.run("who", f"t{number}")["result"]["pid"] for number in range(30)}
    assert len(pids) == 1
    server.run("leaks", "leak", {"number": LEAK})
    for number in range(30, 60):
        pids.add(server.run("who", f"t{number}")["result"]["pid"])
    assert len(pids) == 2
    assert server.slot()["last_exit"]["reason"] == "max_rss"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("raises_recycle_worker", "the cache is beyond repair"),
        ("calls_recycle_worker", "the cache has grown"),
        ("calls_recycle_worker_in_a_thread", "the handler asked for it"),
    ],
)
def test_a_handler_can_have_its_worker_replaced(
    start_server: StartServer, function: str, why: str
) -> None:
    """Raised, RecycleWorker fails the task as any exception does; called, it does not."""
    server = start_server("leaky.py")
    task = server.run(function, "t")
    if function == "raises_recycle_worker":
        assert task["state"] == "failed"
        assert task["error"]["reason"] == "exception"
        assert task["error"]["exception"] == "RecycleWorker"
    else:
        assert task["state"] == "succeeded"
    wait_replaced(server, task["worker"]["pid"], "recycle_worker")
    assert f"This worker is to be replaced: {why}" in server.log
    assert server.run("who", "next")["result"]["pid"] == server.slot()["pid"]


def test_a_failed_task_keeps_nothing_alive(start_server: StartServer) -> None:
    """What was in the frames of its exception is gone before the next task, and not by chance."""
    server = start_server("leaky.py")
    for function in (
        "fails",
        "fails_with_a_cause",
        "fails_async",
        "keeps_its_own_exception",
        "returns_what_it_should_not",
        "is_stopped",
        "is_stopped_async",
    ):
        task = server.run(function, function)
        assert task["state"] == ("timed_out" if "stopped" in function else "failed"), task
        count = server.run("counts_the_living", f"count-{function}")
        assert count["result"]["number"] == 0, function
        assert count["worker"]["pid"] == task["worker"]["pid"]
