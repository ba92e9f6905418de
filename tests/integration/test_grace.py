"""Asking a handler to stop, before the kill: what it sees, what becomes of it and of its worker."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any

import pytest

from conftest import StartServer
from ogpu.service.wire import ASK_SIGNAL
from support.processes import descendants, is_gone, is_standby
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until

STOPPED = [
    "sleeps",
    "computes",
    "tries_again_for_ever",
    "waits_for_a_lock",
    "waits_for_a_queue",
    "waits_for_a_process",
    "waits_for_its_own_loop",
    "reports_progress_for_ever",
    "validates",
    "awaits",
    "computes_between_awaits",
    "awaits_with_a_timeout_of_its_own",
    "awaits_others",
    "awaits_a_group",
    "awaits_in_finally",
    "swallows_a_cancelled_child",
    "cleans_up",
    "leaves_nothing",
    "asks_its_fork",
]
LEAVING = [
    "leaves_a_thread",
    "leaves_a_call_in_a_pool",
    "leaves_a_process",
    "leaves_a_process_of_a_thread",
    "leaves_an_orphan",
    "leaves_an_asyncio_task_behind",
]


def lateness(task: dict[str, Any]) -> float:
    """Return how long after its deadline a task ended."""
    finished, deadline = (
        datetime.fromisoformat(task[key].replace("Z", "+00:00"))
        for key in ("finished_at", "deadline")
    )
    return (finished - deadline).total_seconds()


def facts(server: Server, expression: str) -> tuple[str, int, float]:
    """Return an expression's value in the worker, the worker's pid, how often it ran @init."""
    result = server.run("facts", f"facts-{os.urandom(4).hex()}", {"text": expression})["result"]
    return result["text"], result["pid"], result["number"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_handler_that_stops_keeps_its_worker(start_server: StartServer, method: str) -> None:
    """Whatever it was doing: TaskTimeout ends it, and the same worker runs the next task."""
    server = start_server("graceful.py", OGPU_START_METHOD=method)
    _, pid, _ = facts(server, "")
    for function in STOPPED:
        body = {"text": "slow"} if function == "validates" else {}
        task = server.run(function, function, body)
        assert (task["state"], task["result"]) == ("timed_out", None), task
        error = task["error"]
        assert (error["reason"], error["exception"]) == ("timed_out", "TaskTimeout"), task
        assert "timed out after 0.2 s; it was asked to stop, and did" in error["message"]
        assert error["signal"] is None
        assert "in _awaited" not in error["traceback"]
        if function != "validates":
            assert f"in {function}" in error["traceback"]
        assert facts(server, "") == ("", pid, 1), (function, server.log)
    events, _, _ = facts(server, "events")
    assert eval(events) == [
        "awaited in finally",
        "a child was cancelled",
        "cleaned up",
        "its fork: 0",
    ]
    assert server.run("counts_asyncio_tasks", "count")["result"]["number"] == 0


@pytest.mark.parametrize(
    ("function", "exception"),
    [
        ("returns_after_all", None),
        ("returns_after_all_async", None),
        ("fails_while_it_cleans_up", "OSError"),
        ("serialises", None),
    ],
)
def test_what_it_answers_after_its_deadline_is_dropped(
    start_server: StartServer, sink: Sink, function: str, exception: str | None
) -> None:
    """A result, or another exception: the task has timed out, and no callback is sent."""
    server = start_server("graceful.py", CALLBACK_URL=sink.url)
    task = server.run(function, "late")
    assert (task["state"], task["result"]) == ("timed_out", None)
    assert task["error"]["reason"] == "timed_out"
    assert task["error"]["exception"] == exception
    assert task["callback"]["state"] == "none"
    events, pid, inits = facts(server, "events")
    assert eval(events) == (["returned after all"] if "returns" in function else [])
    assert (pid, inits) == (task["worker"]["pid"], 1)
    assert [delivery.address for delivery in sink.wait_for(1)] != ["late"]


@pytest.mark.parametrize("function", ["refuses", "holds_the_gil"])
def test_a_handler_that_goes_on_is_killed_at_the_end_of_the_grace(
    start_server: StartServer, function: str
) -> None:
    """Not before, and with what it was doing by then."""
    server = start_server("graceful.py")
    task = server.run(function, "t")
    assert task["state"] == "timed_out"
    assert "its worker was killed" in task["error"]["message"]
    assert 0.3 <= lateness(task) < 2
    assert function in task["error"]["stack"]
    assert ("the_place_where_it_hangs" in task["error"]["stack"]) is (function == "refuses")
    _, pid, _ = facts(server, "")
    assert pid != task["worker"]["pid"]
    assert is_gone(task["worker"]["pid"])
    assert server.slot()["last_exit"]["reason"] == "timed_out"


def test_a_grace_for_all_handlers(start_server: StartServer) -> None:
    """OGPU_KILL_GRACE holds where a handler has none of its own; a grace of 0 is one."""
    server = start_server("graceful.py", OGPU_KILL_GRACE=20)
    task = server.run("has_no_grace_of_its_own", "a")
    assert task["error"]["exception"] == "TaskTimeout"
    assert facts(server, "events")[:2] == ("['asked']", task["worker"]["pid"])
    assert "its worker was killed" in server.run("wants_no_grace", "b")["error"]["message"]


def test_without_a_grace_nobody_is_asked(start_server: StartServer) -> None:
    server = start_server("graceful.py")
    task = server.run("has_no_grace_of_its_own", "a")
    assert "its worker was killed" in task["error"]["message"]
    assert lateness(task) < 1
    assert facts(server, "events")[0] == "[]"


@pytest.mark.parametrize("function", LEAVING)
def test_a_task_that_leaves_something_costs_the_worker(
    start_server: StartServer, function: str
) -> None:
    """Stopped means stopped: its threads and processes are gone with the worker."""
    server = start_server("graceful.py")
    _, pid, _ = facts(server, "")
    before = {process.pid for process in descendants()}
    task = server.run(function, "t")
    assert (task["state"], task["error"]["exception"]) == ("timed_out", "TaskTimeout")
    _, successor, _ = facts(server, "")
    assert successor != pid
    assert server.slot()["last_exit"]["reason"] == "leftovers"
    ours = before | {successor}  # which may have been the standby; there will be another one
    wait_until(
        lambda: all(p.pid in ours or is_standby(p) for p in descendants()), "nothing else is left"
    )
    server.wait_log("The task was stopped, but not all of it: ")


def test_a_signal_at_the_very_end_of_a_task_harms_nobody(start_server: StartServer) -> None:
    """Tasks that end within 2 ms of their deadline succeed or time out, and no worker is lost."""
    server = start_server("graceful.py", OGPU_WORKERS=2)
    functions = ("ends_at_the_deadline", "ends_at_the_deadline_async")
    names = [f"{function}-{number}" for number in range(150) for function in functions]
    for name in names:
        assert server.post(name.partition("-")[0], name).status_code == 202
    states = [
        wait_until(lambda name=name: ended(server.task(name)), f"{name} has ended")
        for name in names
    ]
    assert set(states) == {"succeeded", "timed_out"}
    for number in range(2):
        assert server.run("facts", f"after-{number}")["state"] == "succeeded"
    assert [slot["generation"] for slot in server.workers()["workers"]] == [1, 1], server.log


def ended(task: dict[str, Any]) -> str | None:
    return task["state"] if task["state"] not in ("queued", "running") else None


def test_a_signal_between_tasks_means_nothing(start_server: StartServer) -> None:
    """An idle worker, and one whose task has not reached its deadline, take no notice of it."""
    server = start_server()
    pid = server.run("echo", "a")["result"]["pid"]
    os.kill(pid, ASK_SIGNAL)
    server.post("sleep", "b", {"number": 0.3})
    server.wait_state("b", "running")
    os.kill(pid, ASK_SIGNAL)
    assert server.wait_state("b", "succeeded")["result"]["pid"] == pid


def test_a_cancel_does_not_wait_for_the_grace(start_server: StartServer) -> None:
    """It kills the worker of a handler that is cleaning up, at once."""
    server = start_server("graceful.py")
    server.post("takes_its_time", "t")
    server.wait_log("asked to stop")
    assert server.http.delete("/tasks/t").json()["state"] == "cancelled"
    wait_until(lambda: is_gone(server.task("t")["worker"]["pid"]), "the worker is gone", 2)


UVLOOP = """
import asyncio, os, sys
import uvloop
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
import ogpu.service
from pydantic import BaseModel
class Model(BaseModel):
    pid: int = 0
@ogpu.service.expose(timeout=0.2, grace=20)
async def awaits(data: Model) -> Model:
    await asyncio.sleep(60)
    return data
@ogpu.service.expose(timeout=0.2, grace=20)
async def computes(data: Model) -> Model:
    while True:
        pass
@ogpu.service.expose()
async def who(data: Model) -> Model:
    assert "uvloop" in type(asyncio.get_running_loop()).__module__
    return Model(pid=os.getpid())
ogpu.service.start()
"""


def test_another_event_loop_works_as_well(start_server: StartServer) -> None:
    """A source may choose uvloop; what waits in it, and what computes, is stopped likewise."""
    server = start_server(UVLOOP)
    for function in ("awaits", "computes"):
        task = server.run(function, function)
        assert task["error"]["exception"] == "TaskTimeout"
        assert server.run("who", f"who-{function}")["result"]["pid"] == task["worker"]["pid"]
