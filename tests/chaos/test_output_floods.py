"""A handler that prints without end, or spoils its output, blocks nobody and grows nobody's memory.

Each has innocent tasks beside it, and the front's answers and memory are watched
(``support.neighbours``). The cost of a flood to the front is measured in ``benchmarks/floods.py``.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from conftest import StartServer
from support.neighbours import is_whole, neighbours
from support.processes import is_gone
from support.server import Server
from support.waiting import wait_until

KINDS = ["empty lines", "no end of a line", "records of many lines", "brackets", "binary"]
FLOOD_S = 2.0
LINES_PER_S = 1000
LOG_BYTES_PER_S = 9 * 10**6


@pytest.fixture
def server(start_server: StartServer) -> Server:
    server = start_server("flooder.py", OGPU_WORKERS=2)
    wait_until(lambda: is_whole(server), "two workers")
    return server


@pytest.mark.parametrize("kind", KINDS)
def test_a_flood_costs_the_others_nothing_and_its_end_is_kept(server: Server, kind: str) -> None:
    """As fast as it can, up to some hundred MB: the log is bounded, and the record has the end."""
    size = len(server.log)
    with neighbours(server, kind):
        task = server.run("floods", "flood", {"text": kind, "number": FLOOD_S})
    assert task["error"]["exception"] == "TooMuchError"
    lines = task["error"]["output"].splitlines()
    assert lines[-1] == "the end"
    assert len(lines) <= 50
    seconds = FLOOD_S + 2  # it ends a little later, and a window may begin at any time
    assert len(server.log) - size < seconds * LOG_BYTES_PER_S
    assert server.log.count("[worker 0 flood]") + server.log.count("[worker 1 flood]") < (
        seconds * (LINES_PER_S + 1)
    )


def test_all_workers_flood_at_once(server: Server) -> None:
    """The front answers as ever; each of the two has its own end in its record."""
    names = ["one", "other"]
    for name in names:
        server.post("floods", name, {"text": "empty lines", "number": FLOOD_S})
    with neighbours(server, "two floods"):
        tasks = [server.wait_state(name, "failed") for name in names]
    assert all(task["error"]["output"].endswith("\nthe end") for task in tasks)


def test_the_last_words_of_a_worker_that_dies_in_its_flood(server: Server) -> None:
    with neighbours(server, "a death"):
        task = server.run("floods_and_dies", "flood")
    assert task["error"]["signal"] == signal.SIGKILL
    lines = task["error"]["output"].splitlines()
    assert (len(lines), lines[-1]) == (50, "last words")


@pytest.mark.parametrize("function", ["enlarges_the_pipe", "makes_it_nonblocking"])
def test_the_end_is_read_whatever_is_done_to_the_pipe(server: Server, function: str) -> None:
    with neighbours(server, function):
        task = server.run(function, "odd")
    assert task["error"]["exception"] == "TooMuchError", task
    assert task["error"]["output"].splitlines()[-1] == "the end"


def test_what_has_no_output_any_more_still_runs(server: Server) -> None:
    """It closed 1 and 2, its worker goes on, and so does the front."""
    for number in range(4):
        with neighbours(server, "closed"):
            assert server.run("closes_both", f"closes{number}")["result"]["text"] == "done"


def test_a_replaced_stdout_is_the_handlers_own_business(server: Server) -> None:
    task = server.run("replaces_stdout", "a")
    assert task["error"]["exception"] == "TooMuchError"
    assert task["error"]["output"] == "from a subprocess"


def test_threads_that_print_on_do_not_hold_up_the_end(server: Server) -> None:
    """The task ends while they print, and the next ones run beside them."""
    with neighbours(server, "threads"):
        task = server.run("leaves_threads", "threads", {"number": 2}, wait_s=1)
        assert task["result"]["text"] == "done"
        for number in range(10):
            assert server.run("echo", f"next{number}", wait_s=2)["state"] == "succeeded"


@pytest.mark.parametrize("child", ["sleep 600", "yes"])
def test_a_grandchild_with_the_pipe_holds_up_no_end(server: Server, child: str) -> None:
    """Neither that of the task, nor that of the worker: it ends with the worker."""
    with neighbours(server, child):
        task = server.run("leaves_a_child", "parent", {"text": child}, wait_s=2)
        pid, slot = int(task["result"]["text"]), task["worker"]["slot"]
        assert not is_gone(pid)
        for number in range(10):  # two at a time: one of them in the worker that is the parent
            server.post("hangs", f"hang{number}")
            if server.wait_state(f"hang{number}", "timed_out")["worker"]["slot"] == slot:
                break
        wait_until(lambda: is_gone(pid), "the child is gone", timeout_s=5)
        wait_until(lambda: server.slot(slot)["generation"] == 2, "the slot is filled", 5)


def test_output_waits_for_a_front_that_is_busy(server: Server, tmp_path: Path) -> None:
    """A stopped front reads nothing: the writer waits, loses nothing, and goes on after it."""
    go_on = tmp_path / "go on"
    server.post("prints_when_told", "a", {"text": str(go_on)})
    server.wait_state("a", "running")
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        go_on.touch()
        wait_until((tmp_path / "go on.begun").exists, "it prints")
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    task = server.wait_state("a", "failed")
    lines = task["error"]["output"].splitlines()
    assert (len(lines), lines[-1]) == (50, "the end")
