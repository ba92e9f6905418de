"""Every death explains itself: stacks at the kill, signals, exit codes, the last output."""

from __future__ import annotations

import os
import signal
import time

import pytest

from conftest import StartServer
from support.waiting import wait_until

# handler, what its stack names
HANGS = [
    ("hangs_asleep", "in hangs_asleep"),
    ("hangs_in_python", "in hangs_in_python"),
    ("hangs_in_c", "in hangs_in_c"),
    ("hangs_with_the_gil", "in hangs_with_the_gil"),
    ("hangs_in_a_regex", "in hangs_in_a_regex"),
    ("hangs_and_ignores_signals", "in hangs_and_ignores_signals"),
    ("hangs_async", "in _run_once"),
]


def test_a_hung_handler_says_where_it_was(start_server: StartServer) -> None:
    """With the GIL held, too: in the task, in the log, in the list of workers, and in a metric."""
    server = start_server(OGPU_WORKERS=2)
    for function, frame in HANGS:
        task = server.run(function, function)
        assert task["state"] == "timed_out"
        assert frame in task["error"]["stack"], task["error"]
        assert task["error"]["signal"] == signal.SIGKILL
        server.wait_log(f"it was here:\n{task['error']['stack'][:40]}")
    exits = [slot["last_exit"] for slot in server.workers()["workers"] if slot["last_exit"]]
    assert {e["reason"] for e in exits} == {"timed_out"}
    assert {(e["signal"], e["exit_code"]) for e in exits} == {(signal.SIGKILL, None)}
    metrics = server.http.get("/metrics").text
    assert f'ogpu_worker_restarts_total{{reason="timed_out"}} {len(HANGS)}.0' in metrics


def test_every_thread_is_told(start_server: StartServer) -> None:
    """A handler that waits for its threads: their stacks are what one wants to see."""
    server = start_server()
    stack = server.run("hangs_in_threads", "a")["error"]["stack"]
    assert stack.count("Thread 0x") + stack.count("Current thread 0x") == 5


def test_a_cancelled_task_says_where_it_was(start_server: StartServer) -> None:
    server = start_server()
    server.post("sleep", "a", {"number": 3600})
    server.wait_state("a", "running")
    task = server.http.delete("/tasks/a").json()
    assert task["state"] == "cancelled"
    assert "in sleep" in task["error"]["stack"]
    wait_until(lambda: server.slot()["state"] == "ready", "a new worker")
    assert server.slot()["last_exit"]["reason"] == "cancelled"


def test_a_crash_in_c_says_where_it_was(start_server: StartServer) -> None:
    server = start_server()
    error = server.run("crashes_in_c", "a")["error"]
    assert (error["reason"], error["signal"]) == ("worker_died", signal.SIGSEGV)
    assert "Segmentation fault" in error["stack"]
    assert "in crashes_in_c" in error["stack"]
    server.wait_log("it was here:\nFatal Python error: Segmentation fault")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_both_ways_to_make_workers_tell(start_server: StartServer, method: str) -> None:
    server = start_server(OGPU_START_METHOD=method)
    assert "in hangs_in_c" in server.run("hangs_in_c", "a")["error"]["stack"]


SOURCE = """
import ctypes, faulthandler, os, signal, subprocess, sys, time
import ogpu.service
from pydantic import BaseModel

class Data(BaseModel):
    text: str = ""

@ogpu.service.expose(timeout=0.5)
def blocks_signals(data: Data) -> Data:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(3600)

@ogpu.service.expose(timeout=0.5)
def ignores_even_real_time_signals(data: Data) -> Data:
    for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(3600)

@ogpu.service.expose(timeout=0.5)
def stopped(data: Data) -> Data:
    os.kill(os.getpid(), signal.SIGSTOP)
    return data

@ogpu.service.expose(timeout=0.5)
def is_another_program(data: Data) -> Data:
    os.execlp("sleep", "sleep", "3600")

@ogpu.service.expose(timeout=0.5)
def closes_the_file(data: Data) -> Data:
    os.closerange(3, 100_000)
    time.sleep(3600)

@ogpu.service.expose(timeout=0.5)
def writes_to_the_file(data: Data) -> Data:
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.exists(path) and "memfd" in os.readlink(path):
            try:
                while True:
                    os.write(int(name), b"\\xff" * 65536)
            except OSError:
                pass
    time.sleep(3600)

@ogpu.service.expose(timeout=1.5)
def had_a_child_that_crashed(data: Data) -> Data:
    if os.fork() == 0:
        ctypes.string_at(0)
    os.wait()
    time.sleep(3600)

@ogpu.service.expose(timeout=0.5)
def has_many_deep_threads(data: Data) -> Data:
    import threading
    def deep(n):
        time.sleep(3600) if n == 0 else deep(n - 1)
    for _ in range(60):
        threading.Thread(target=deep, args=(300,), daemon=True).start()
    time.sleep(3600)

ogpu.service.start()
"""


def test_what_would_not_tell_is_killed_all_the_same(start_server: StartServer) -> None:
    """Blocked or ignored signals, another program, a stopped process, a file that is closed."""
    server = start_server(SOURCE)
    for function in (
        "blocks_signals",
        "ignores_even_real_time_signals",
        "stopped",
        "is_another_program",
        "closes_the_file",
    ):
        pid = server.slot()["pid"]
        task = server.run(function, function)
        assert (task["state"], task["error"]["stack"]) == ("timed_out", None), function
        wait_until(lambda: server.slot()["pid"] not in (pid, None), "a new worker")  # noqa: B023


def test_a_file_of_stacks_that_was_written_to_holds_the_last_word(
    start_server: StartServer,
) -> None:
    """Neither what a handler wrote there nor what a child of it left is taken for its stacks."""
    server = start_server(SOURCE)
    stack = server.run("writes_to_the_file", "a")["error"]["stack"]
    assert "in writes_to_the_file" in stack
    assert "\\xff" not in stack
    stack = server.run("had_a_child_that_crashed", "b")["error"]["stack"]
    assert "in had_a_child_that_crashed" in stack
    assert "Segmentation" not in stack


def test_many_deep_threads_do_not_hold_up_the_kill(start_server: StartServer) -> None:
    """What fits is told; the worker is gone within a fraction of a second after the deadline."""
    server = start_server(SOURCE)
    pid = server.slot()["pid"]
    began = time.monotonic()
    task = server.run("has_many_deep_threads", "a")
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "gone")
    assert time.monotonic() - began < 0.5 + 1.0
    assert "in deep" in task["error"]["stack"]
    assert len(task["error"]["stack"]) <= 64 * 1024
