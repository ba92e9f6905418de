"""How tasks end: each way fails its own task, says why, and costs no other."""

from __future__ import annotations

import json
import os
import signal

import pytest

from conftest import StartServer
from support.processes import is_gone
from support.waiting import wait_until

EXCEPTIONS = [
    ("raises", "exception", "no luck", "ValueError"),
    ("raises_strangely", "exception", "cannot be shown", "Strange"),
    ("exits", "exception", "7", "SystemExit"),
    ("returns_none", "invalid_output", "returned None; Output was declared", None),
    ("returns_other", "invalid_output", "returned a Other; Output was declared", None),
    ("returns_unwritable", "invalid_output", "cannot be written as JSON", None),
]


def test_an_exception_fails_its_task_and_costs_no_worker(start_server: StartServer) -> None:
    server = start_server()
    pid = server.slot()["pid"]
    for function, reason, message, exception in EXCEPTIONS:
        task = server.run(function, function)
        error = task["error"]
        assert task["state"] == "failed"
        assert task["result"] is None
        assert error["reason"] == reason
        assert message in error["message"]
        assert error["exception"] == exception
        assert (error["signal"], error["exit_code"]) == (None, None)
        assert server.slot()["pid"] == pid
    assert server.slot()["tasks_done"] == len(EXCEPTIONS)


def test_a_traceback_starts_in_the_source_and_is_logged(start_server: StartServer) -> None:
    server = start_server()
    error = server.run("raises", "a", {"text": "told you"})["error"]
    first, *_, last = error["traceback"].splitlines()
    assert first.startswith("Traceback")
    assert last == "ValueError: told you"
    assert "worker/loop.py" not in error["traceback"]
    assert error["output"] == "about to fail"
    server.wait_log("❌ FAIL      [a] Error in `raises`: told you")


@pytest.mark.parametrize(
    ("function", "number", "exit_code", "by_signal"),
    [
        ("exits_hard", 0, 7, None),
        ("crashes_in_c", 0, None, int(signal.SIGSEGV)),
        ("dies_of", int(signal.SIGKILL), None, int(signal.SIGKILL)),
        ("dies_of", int(signal.SIGTERM), None, int(signal.SIGTERM)),
        ("dies_of", int(signal.SIGABRT), None, int(signal.SIGABRT)),
    ],
)
def test_a_death_fails_its_task_and_costs_one_respawn(
    start_server: StartServer, function: str, number: int, exit_code: int, by_signal: int
) -> None:
    server = start_server()
    before = server.slot()
    task = server.run(function, "a", {"number": number})
    error = task["error"]
    assert (task["state"], error["reason"]) == ("failed", "worker_died")
    assert (error["exit_code"], error["signal"]) == (exit_code, by_signal)
    assert f"while it ran `{function}`" in error["message"]
    assert server.run("echo", "b")["state"] == "succeeded"
    after = server.slot()
    assert after["generation"] == before["generation"] + 1
    assert after["last_exit"]["reason"] == "died"
    assert (after["last_exit"]["exit_code"], after["last_exit"]["signal"]) == (exit_code, by_signal)
    assert is_gone(before["pid"])


@pytest.mark.parametrize("function", ["closes_everything", "writes_garbage"])
def test_a_worker_that_breaks_its_channel_is_killed(
    start_server: StartServer, function: str
) -> None:
    server = start_server()
    task = server.run(function, "a")
    assert task["error"]["reason"] == "worker_died"
    assert "closed its channel" in task["error"]["message"]
    assert server.run("echo", "b")["state"] == "succeeded"
    assert server.slot()["last_exit"]["reason"] == "broken_channel"


def test_an_idle_worker_that_is_killed_is_replaced(start_server: StartServer) -> None:
    """Nobody's task, nobody's fault: a new worker, and readiness follows."""
    server = start_server()
    server.run("echo", "a")
    pid = server.slot()["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.slot()["pid"] not in (None, pid), "a new worker")
    assert server.run("echo", "b")["state"] == "succeeded"


def test_a_killed_idle_worker_loses_no_task(start_server: StartServer) -> None:
    """A task given to a worker that dies before it took it is run by the next one."""
    server = start_server()
    for number in range(20):
        server.run("echo", f"warm{number}")
        os.kill(server.slot()["pid"], signal.SIGKILL)
        task = server.run("echo", f"t{number}", {"text": str(number)})
        assert task["state"] == "succeeded", task
        assert task["result"]["text"] == str(number)


def test_a_stopped_worker_is_given_its_task_when_it_goes_on(start_server: StartServer) -> None:
    server = start_server()
    pid = server.slot()["pid"]
    os.kill(pid, signal.SIGSTOP)
    server.post("echo", "a")
    server.wait_state("a", "running")
    os.kill(pid, signal.SIGCONT)
    server.wait_state("a", "succeeded")


def test_a_task_that_was_never_taken_is_queued_again(start_server: StartServer) -> None:
    """Killed while stopped, a worker had not read its order: the task is innocent, and runs."""
    server = start_server()
    server.run("echo", "warm")
    pid = server.slot()["pid"]
    os.kill(pid, signal.SIGSTOP)
    server.post("echo", "a", {"text": "innocent"})
    server.wait_state("a", "running")
    os.kill(pid, signal.SIGKILL)
    task = server.wait_state("a", "succeeded")
    assert task["result"]["text"] == "innocent"
    assert task["worker"]["generation"] == 2
    server.wait_log("[a] queued again: its worker died before it took the task")


def test_async_handlers_share_the_workers_own_loop(start_server: StartServer) -> None:
    server = start_server()
    first, second = server.run("echo_async", "a"), server.run("echo_async", "b")
    assert first["result"]["number"] == second["result"]["number"]
    assert server.run("echo", "c")["state"] == "succeeded"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_handlers_may_start_processes(start_server: StartServer, method: str) -> None:
    """Workers are not daemonic, and children that import the source again do not serve it."""
    task = start_server().run("uses_processes", "a", {"text": method})
    assert task["result"]["number"] == 6, task


def test_start_in_a_worker_returns_at_once(start_server: StartServer) -> None:
    assert start_server().run("starts_again", "a")["result"]["text"] == "returned"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_imports_no_web_code(start_server: StartServer, method: str) -> None:
    server = start_server(OGPU_START_METHOD=method)
    expression = "sorted({'fastapi', 'uvicorn', 'httptools', 'uvloop'} & set(sys.modules))"
    assert server.run("facts", "a", {"text": expression})["result"]["text"] == "[]"
    assert server.run("facts", "b", {"text": "1"})["result"]["number"] == 1  # @init ran once


def test_workers_have_nothing_of_the_fronts(start_server: StartServer) -> None:
    """An own session and own signals, an empty stdin, output, one channel, stacks, its argv."""
    for method in ("fork", "spawn"):
        server = start_server(OGPU_START_METHOD=method)
        found = json.loads(server.run("looks_around", "a")["result"]["text"])
        assert found["leads_session"]
        assert found["sigterm_is_default"]
        assert found["blocked_signals"] == []
        assert found["argv"][0].endswith("zoo.py")
        descriptors = found["descriptors"]
        assert descriptors.pop("0") == "/dev/null"
        assert (descriptors.pop("1"), descriptors.pop("2")) == ("pipe", "pipe")
        assert descriptors.pop("2000").startswith("/memfd")  # for its stacks
        # To open 1 and 2 again, where a handler has closed them.
        kept = {descriptors.pop(str(number)) for number in (100, 101, 102)}
        assert kept == {"pipe", "socket"}  # and for orders ahead
        kinds = sorted(descriptors.values())
        # zoo.py has an async handler: its event loop has an epoll and a pair of sockets.
        assert kinds == ["anon_inode", "socket", "socket", "socket"], (method, kinds)
