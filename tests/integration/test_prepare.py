"""@prepare: once for all workers and their replacements, and what becomes of one that fails."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from conftest import StartServer
from support.processes import is_gone
from support.server import Server
from support.waiting import wait_until

START_LIMIT_S = 20
StartPrepared = Callable[..., Server]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where the source notes what it did."""
    return tmp_path / "notes"


@pytest.fixture
def start_prepared(start_server: StartServer, notes: Path) -> StartPrepared:
    def start(faults: str = "", **settings: object) -> Server:
        return start_server("prepared.py", PREPARED_NOTES=notes, PREPARED_FAULTS=faults, **settings)

    return start


def noted(notes: Path, what: str) -> list[int]:
    """Return the pids of those that did it."""
    lines = notes.read_text().splitlines() if notes.exists() else []
    return [int(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{what} ")]


def template_of(server: Server) -> int:
    return int(re.findall(r"template: pid (\d+)", server.log)[-1])


def wait_whole(server: Server) -> None:
    def whole() -> bool:
        return all(slot["state"] == "ready" for slot in server.workers()["workers"])

    wait_until(whole, "every worker is ready")


def pss_bytes(pid: int) -> int:
    return int(psutil.Process(pid).memory_full_info().pss)


def test_workers_and_replacements_share_what_was_prepared_once(
    start_prepared: StartPrepared, notes: Path
) -> None:
    """One run, in the template; 100 MB of it are in memory once, for two workers and the template.

    What it prints and logs is in the log.
    """
    size_bytes = 100 * 2**20
    server = start_prepared(OGPU_WORKERS=2, PREPARED_SIZE_BYTES=size_bytes)
    wait_whole(server)
    template = template_of(server)
    assert "fetching the weights" in server.log
    assert f"the weights have {size_bytes} bytes" in server.log
    assert "@prepare took" in server.log
    killed = server.slot()["pid"]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: server.slot()["pid"] not in (killed, None), "a replacement")
    wait_whole(server)
    assert server.run("look", "a")["result"]["text"] == f"{size_bytes} bytes from {template}"
    workers = [slot["pid"] for slot in server.workers()["workers"]]
    assert sum(pss_bytes(pid) for pid in [template, *workers]) < 1.6 * size_bytes
    assert noted(notes, "prepare") == [template]
    assert len(noted(notes, "init")) == 3
    assert server.stop() == 0


def test_a_thread_that_stays_has_each_worker_prepare_for_itself(
    start_prepared: StartPrepared, notes: Path
) -> None:
    """The log says why; the template has given the memory back; the first worker was alone."""
    size_bytes = 50 * 2**20
    server = start_prepared("thread", OGPU_WORKERS=2, PREPARED_SIZE_BYTES=size_bytes)
    wait_whole(server)
    assert "not safe: the source started threads while it was imported or prepared (fetcher)" in (
        server.log
    )
    assert "Workers are made by spawn" in server.log
    task = server.run("look", "a")
    pid = task["result"]["pid"]
    assert task["result"]["text"] == f"{size_bytes} bytes from {pid}"
    template, first, second = noted(notes, "prepare")[:3]
    assert template == template_of(server)
    assert pss_bytes(template) < size_bytes
    assert noted(notes, "init")[:2] == [first, second]


def test_a_wanted_fork_stays_with_a_warning(start_prepared: StartPrepared) -> None:
    """OGPU_START_METHOD=fork overrides the hazard that @prepare has left."""
    server = start_prepared("thread", OGPU_START_METHOD="fork")
    assert "Workers are forked (OGPU_START_METHOD), though that is not safe" in server.log
    assert server.run("look", "a")["result"]["text"] == f"1 bytes from {template_of(server)}"


def test_a_progress_bar_does_no_harm(start_prepared: StartPrepared) -> None:
    """tqdm's monitor thread is ended, and its lock between processes is none any more.

    A worker that is killed while it holds the lock would keep all others from drawing a bar. Nor
    does a child that @prepare forks become another template.
    """
    server = start_prepared("progress bar, forks", OGPU_WORKERS=2)
    assert server.log.count("Workers are made by fork") == 1
    assert server.run("draws_and_dies", "dies")["error"]["reason"] == "worker_died"
    for number in range(2):
        assert server.run("draws", f"draws-{number}")["result"]["text"] == "drawn"


def test_what_it_starts_can_be_terminated(start_prepared: StartPrepared) -> None:
    """By SIGTERM: the template is deaf to that, and what @prepare starts or forks is not."""
    server = start_prepared("terminates", OGPU_START_METHOD="fork")
    assert server.run("look", "a")["state"] == "succeeded"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_failure_at_the_first_start_ends_the_program(
    start_prepared: StartPrepared, method: str
) -> None:
    """Exit code 3, with the traceback, as for @init."""
    server = start_prepared("raises", wait=False, OGPU_START_METHOD=method)
    assert server.wait_exit() == 3
    assert "RuntimeError: the mirror is down" in server.log
    assert 'prepared.py", line' in server.log
    assert "the first worker did not become ready: its @" in server.log


def test_a_template_that_prepare_kills_ends_the_program(start_prepared: StartPrepared) -> None:
    server = start_prepared("dies", wait=False)
    assert server.wait_exit() == 3
    assert "did not become ready: the template was ended by SIGKILL before it was" in server.log


def test_a_prepare_that_hangs_is_bounded(start_prepared: StartPrepared) -> None:
    server = start_prepared("hangs", wait=False, OGPU_INIT_TIMEOUT=0.5)
    assert server.wait_exit() == 3
    assert "has not imported the source and run @prepare within OGPU_INIT_TIMEOUT" in server.log


@pytest.mark.parametrize("bind", ["ready", "early"])
def test_sigterm_ends_it_at_once(start_prepared: StartPrepared, notes: Path, bind: str) -> None:
    """While the front still imports, and while it serves; with what @prepare has started."""
    server = start_prepared("hangs", wait=False, OGPU_BIND=bind)
    wait_until(lambda: noted(notes, "hangs"), "it hangs", START_LIMIT_S)
    if bind == "early":
        server.wait_listening()
        assert server.http.get("/readyz").json()["reason"] == "starting"
        assert server.post("look", "waits").status_code == 202
    assert server.stop(timeout_s=5) == 0


def test_it_does_not_outlive_the_front(start_prepared: StartPrepared, notes: Path) -> None:
    """The kernel ends a template that listens to nobody."""
    server = start_prepared("hangs", wait=False)
    wait_until(lambda: noted(notes, "hangs"), "it hangs", START_LIMIT_S)
    (template,) = noted(notes, "prepare")
    (started,) = psutil.Process(template).children()
    server.process.kill()
    server.wait_exit()
    wait_until(lambda: is_gone(template), "the template is gone", 5)
    started.kill()  # this one nobody looks after: a known limit outside a container


@pytest.mark.parametrize(
    ("fault", "limit_s", "told"),
    [
        ("raises later", "", "RuntimeError: the mirror is down"),
        ("hangs later", 1, "has not imported the source and run @prepare"),
    ],
)
def test_another_template_that_cannot_prepare_costs_the_crash_budget(
    start_prepared: StartPrepared, fault: str, limit_s: object, told: str
) -> None:
    """The service is broken, and /readyz has the traceback."""
    server = start_prepared(fault, OGPU_CRASH_BUDGET=1, OGPU_INIT_TIMEOUT=limit_s)
    os.kill(template_of(server), signal.SIGKILL)

    def why() -> str | None:
        answer = server.http.get("/readyz").json()
        return answer["detail"] if answer.get("reason") == "broken" else None

    detail = wait_until(why, "it is broken", START_LIMIT_S)
    assert detail is not None
    assert told in detail
