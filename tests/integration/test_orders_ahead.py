"""Orders ahead: a busy worker goes on to the next tasks by itself, and nobody can tell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from support.server import Server
from support.waiting import wait_until

OTHERS = ["b", "c", "d"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "gate").mkdir()
    return tmp_path / "gate"


class Stage:
    """A server whose worker runs task ``a``, which waits, with the orders of ``OTHERS`` ahead."""

    def __init__(self, server: Server, folder: Path, do: str = "wait", others: str = "nothing"):
        self.server, self._folder = server, folder
        wait_until(lambda: self._set(do, others), "orders are ahead", 20)

    def _set(self, do: str, others: str) -> bool:
        """Have the orders ahead; False: on a busy machine tasks take longer than short ones."""
        for name in ("go", "ahead", "ran"):
            (self._folder / name).unlink(missing_ok=True)
        for number in range(20):  # tasks are known to be short
            assert self.server.run("step", f"first-{number}")["state"] == "succeeded"
        assert self.server.post("step", "a", {"do": do}).status_code == 202
        self.server.wait_state("a", "running")
        for address in OTHERS:
            assert self.server.post("step", address, {"do": others}).status_code == 202
        try:
            wait_until(self._are_ahead, "orders are ahead", 0.5)
        except AssertionError:
            self.go()
            self.ends()
            return False
        return True

    def _are_ahead(self) -> bool:
        """Tell whether all orders are where the worker takes them: each has some 70 bytes."""
        file = self._folder / "ahead"
        there = int(file.read_text()) if file.exists() else 0
        return there > 50 * len(OTHERS)

    def go(self) -> None:
        """Let ``a`` go on."""
        (self._folder / "go").touch()

    def ends(self) -> dict[str, dict[str, Any]]:
        """Wait for the ends of all tasks."""

        def over() -> bool:
            return all(self.server.task(name)["finished_at"] for name in ["a", *OTHERS])

        wait_until(over, "all have ended")
        return {name: self.server.task(name) for name in ["a", *OTHERS]}

    def ran(self) -> list[str]:
        """Return the addresses of the runs, in order."""
        runs = (self._folder / "ran").read_text().split()
        return [address for address in runs if not address.startswith("first")]


@pytest.fixture
def start(start_server: StartServer, folder: Path) -> Iterator[Any]:
    def begin(**settings: object) -> Server:
        return start_server("ahead.py", AHEAD_FOLDER=folder, **settings)

    yield begin
    (folder / "go").touch()


def assert_untouched(ends: dict[str, dict[str, Any]]) -> None:
    """The other tasks ran once, with all their time, in their first attempt."""
    for name in OTHERS:
        assert ends[name]["state"] == "succeeded", ends[name]
        assert ends[name]["attempt"] == ends[name]["result"]["attempt"] == 1
        assert 1.9 < ends[name]["result"]["left_s"] <= 2


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_worker_goes_on_by_itself(start: Any, folder: Path, method: str) -> None:
    """In order, each with a clock of its own; a waiting task is queued until it runs."""
    stage = Stage(start(OGPU_START_METHOD=method), folder)
    server = stage.server
    assert [server.task(name)["state"] for name in OTHERS] == ["queued"] * 3
    assert server.workers()["queue_depth"] == 3
    stage.go()
    ends = stage.ends()
    assert_untouched(ends)
    assert stage.ran() == ["a", *OTHERS]
    assert len({end["result"]["pid"] for end in ends.values()}) == 1
    assert server.workers()["queue_depth"] == 0


def test_a_deadline_is_not_theirs(start: Any, folder: Path) -> None:
    """The running task is killed at its deadline: what was ahead runs in the next worker."""
    stage = Stage(start(), folder)
    ends = stage.ends()
    assert ends["a"]["state"] == "timed_out"
    assert_untouched(ends)
    assert stage.ran() == ["a", *OTHERS]


@pytest.mark.parametrize(("do", "state"), [("die", "failed"), ("fail", "failed")])
def test_a_failure_is_not_theirs(start: Any, folder: Path, do: str, state: str) -> None:
    """The running task fails, or ends its worker: what was ahead runs, as a first attempt."""
    stage = Stage(start(), folder, do)
    stage.go()
    ends = stage.ends()
    assert ends["a"]["state"] == state
    assert_untouched(ends)
    assert stage.ran() == ["a", *OTHERS]


def test_a_worker_that_is_replaced_takes_none(start: Any, folder: Path) -> None:
    """RecycleWorker: the next task runs in the next worker."""
    stage = Stage(start(), folder, "leave")
    pid = stage.server.slot()["pid"]
    stage.go()
    ends = stage.ends()
    assert_untouched(ends)
    assert pid not in {ends[name]["result"]["pid"] for name in OTHERS}


def test_a_waiting_one_is_cancelled(start: Any, folder: Path) -> None:
    """DELETE of a task that is ahead: it never runs, and the others are where they were."""
    stage = Stage(start(), folder)
    assert stage.server.http.delete("/tasks/c").json()["state"] == "cancelled"
    stage.go()
    ends = stage.ends()
    assert [end["state"] for end in ends.values()] == [
        "succeeded",
        "succeeded",
        "cancelled",
        "succeeded",
    ]
    assert stage.ran() == ["a", "b", "d"]


def test_the_running_one_is_cancelled(start: Any, folder: Path) -> None:
    """DELETE of the running task kills its worker; what was ahead runs in the next one."""
    stage = Stage(start(), folder)
    assert stage.server.http.delete("/tasks/a").json()["state"] == "cancelled"
    assert_untouched(stage.ends())
    assert stage.ran() == ["a", *OTHERS]


def test_they_count_as_waiting(start: Any, folder: Path) -> None:
    """OGPU_QUEUE_SIZE is for those that are ahead, too."""
    stage = Stage(start(OGPU_QUEUE_SIZE=3), folder)
    refused = stage.server.post("step", "e")
    assert refused.status_code == 503
    stage.go()
    assert_untouched(stage.ends())


def test_another_worker_that_is_free_runs_them(start: Any, folder: Path) -> None:
    """Two workers: what is ahead of one does not wait for it while the other one has nothing."""
    server = start(OGPU_WORKERS=2)
    wait_until(lambda: [s["state"] for s in server.workers()["workers"]] == ["ready"] * 2, "both")
    for number in range(8):
        server.run("step", f"first-{number}")
    server.post("step", "a", {"do": "wait"})
    server.wait_state("a", "running")
    with ThreadPoolExecutor(8) as clients:
        names = [f"t{number}" for number in range(200)]
        ends = list(clients.map(lambda name: server.run("step", name), names))
    assert {end["state"] for end in ends} == {"succeeded"}
    assert server.task("a")["state"] == "running"
    (folder / "go").touch()
    assert server.wait_state("a", "succeeded")["attempt"] == 1


def test_lines_are_of_the_task_that_printed_them(start: Any, folder: Path) -> None:
    """However fast one task follows another."""
    stage = Stage(start(), folder, others="print")
    stage.go()
    stage.ends()
    server = stage.server
    with ThreadPoolExecutor(8) as clients:
        for number in range(400):
            do = "print" if number % 3 == 0 else "nothing"
            clients.submit(server.run, "step", f"p{number}", {"do": do})
    server.stop()
    said = re.findall(r"\[worker 0 (\w+)\] this is (\w+)$", server.log, re.MULTILINE)
    assert len(set(said)) == len(OTHERS) + 134
    assert [task for task, line in said if task != line] == []


def test_a_source_may_close_the_socket(start: Any, folder: Path) -> None:
    """Orders come one by one then."""
    stage = Stage(start(), folder, others="close")
    stage.go()
    assert_untouched(stage.ends())


@pytest.mark.parametrize("number", [9, 15])
def test_the_next_start_runs_them(start: Any, folder: Path, tmp_path: Path, number: int) -> None:
    """The front is killed, or stopped, while orders are ahead: their tasks wait for the next."""
    state = tmp_path / "state"
    stage = Stage(start(OGPU_STATE_DIR=state, OGPU_DRAIN_TIMEOUT=0.1), folder)
    stage.server.process.send_signal(number)
    stage.server.wait_exit()
    stage.go()
    after = start(OGPU_STATE_DIR=state)
    stage.server = after
    assert_untouched(stage.ends())
    assert stage.ran() == ["a", "a", *OTHERS]
