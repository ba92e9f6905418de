"""A real server on disks in trouble: read-only, damaged, taken, full; and on none at all."""

from __future__ import annotations

import errno
import http.client
import json
import os
import resource
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import httpx
import psutil
import pytest

from conftest import StartServer
from support.server import Server
from support.waiting import wait_until

Mount = Callable[..., Path]
UNAVAILABLE = "urn:ogpu:problem:journal-unavailable"


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mount small file systems in memory, and unmount them after the servers have ended."""
    mounted: list[Path] = []

    def mount_one(options: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount_one
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def refused(server: Server) -> str:
    """Return what a server said that refused to start; nothing of it is left (a fixture looks)."""
    assert server.wait_exit() == 2, server.log
    assert "Traceback" not in server.log
    assert "Listening" not in server.log
    return server.log


# --- refused at the start


def test_a_read_only_folder_is_refused(mount: Mount, start_server: StartServer) -> None:
    """Exit code 2, the variable, the folder and the reason; nothing is left running."""
    folder = mount("ro,size=1m")
    log = refused(start_server(wait=False, OGPU_STATE_DIR=folder))
    assert f"OGPU_STATE_DIR={folder}: {os.strerror(errno.EROFS)}" in log


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, start_server: StartServer) -> None:
    """A path below a file, for instance."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "state"
    log = refused(start_server(wait=False, OGPU_STATE_DIR=folder))
    assert f"OGPU_STATE_DIR={folder}: {os.strerror(errno.ENOTDIR)}" in log


def test_a_folder_without_room_is_refused(mount: Mount, start_server: StartServer) -> None:
    """A disk that is full from the beginning is an error at the start, not a 503 later."""
    disk = mount("size=64k")
    fill(disk / "ballast")
    log = refused(start_server(wait=False, OGPU_STATE_DIR=disk / "state"))
    assert str(disk / "state") in log


def test_a_damaged_journal_is_refused(tmp_path: Path, start_server: StartServer) -> None:
    """The file is named, what to do is said, and it is left as it was."""
    folder = tmp_path / "state"
    server = start_server(OGPU_STATE_DIR=folder)
    server.run("echo", "a")
    assert server.stop() == 0
    file = folder / "journal.db"
    whole = file.read_bytes()
    file.write_bytes(whole[:4096] + bytes(byte ^ 0xFF for byte in whole[4096:]))
    log = refused(start_server(wait=False, OGPU_STATE_DIR=folder))
    assert f"the journal {file} is damaged" in log
    assert "put it aside" in log
    assert len(file.read_bytes()) == len(whole)


def test_a_second_service_on_a_folder_is_refused(tmp_path: Path, start_server: StartServer) -> None:
    """It is told who has the folder, before it loads anything; the first one goes on."""
    folder, order = tmp_path / "state", tmp_path / "inits"
    first = start_server(OGPU_STATE_DIR=folder)
    log = refused(start_server(wait=False, OGPU_STATE_DIR=folder, ZOO_INIT_LOG=order))
    assert f"OGPU_STATE_DIR={folder}: the service with pid {first.process.pid}" in log
    assert not order.exists()
    assert first.run("echo", "a")["state"] == "succeeded"
    assert first.task("a")["state"] == "succeeded"  # what is shown is on the disk
    first.process.kill()
    first.process.wait()
    assert start_server(OGPU_STATE_DIR=folder).task("a")["state"] == "succeeded"


# --- full while it serves


def fill(ballast: Path) -> None:
    """Write a file until nothing more goes in."""
    full = os.strerror(errno.ENOSPC)
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match=full):
        file.writelines(repeat(bytes(4096)))


def post_until_refused(
    server: Server, size: int, most: int = 200
) -> tuple[list[str], httpx.Response]:
    """Post tasks until one is refused; return the accepted ones, and the refusal."""
    accepted: list[str] = []
    for number in range(most):
        response = server.post("echo", f"t{number}", {"text": "x" * size})
        if response.status_code != 202:
            return accepted, response
        accepted.append(f"t{number}")
    raise AssertionError("a thousand tasks were accepted")


def check_trouble(server: Server, refusal: httpx.Response, why: str) -> None:
    """The service refuses, says why, wants to be asked later, and lives."""
    assert refusal.status_code == 503
    assert refusal.headers["content-type"] == "application/problem+json"
    assert refusal.headers["retry-after"].isdigit()
    assert refusal.json()["type"] == UNAVAILABLE
    assert why in refusal.json()["detail"]
    ready = server.http.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["reason"] == "broken"
    assert why in ready.json()["detail"].lower()
    assert server.http.get("/healthz").status_code == 200


def check_recovery(server: Server, accepted: list[str]) -> None:
    """What was accepted has run; the service is ready again; what it said is what it knows."""
    for address in accepted:
        assert server.wait_state(address, "succeeded", timeout_s=30)["attempt"] == 1
    wait_until(lambda: server.http.get("/readyz").status_code == 200, "ready again")
    assert server.run("echo", "afterwards")["state"] == "succeeded"
    assert server.stop() == 0
    known = server_tasks(server)
    assert known == dict.fromkeys([*accepted, "first", "afterwards"], "succeeded")


def server_tasks(server: Server) -> dict[str, str]:
    """Read the journal of a server that has ended."""
    (line,) = (line for line in server.log.splitlines() if "Tasks are kept in " in line)
    connection = sqlite3.connect(Path(line.rpartition("kept in ")[2].strip()) / "journal.db")
    known = dict(connection.execute("SELECT address, state FROM tasks"))
    connection.close()
    return known


@pytest.mark.parametrize(("disk_size", "size"), [("8m", 600_000), ("2m", 100_000), ("2m", 10_000)])
def test_a_full_disk_loses_nothing_that_was_accepted(
    mount: Mount, tmp_path: Path, start_server: StartServer, disk_size: str, size: int
) -> None:
    """What does not fit is refused; what was accepted runs, and is recorded when there is room."""
    disk, go_on = mount(f"size={disk_size}"), tmp_path / "go on"
    server = start_server(OGPU_STATE_DIR=disk / "state")
    server.post("waits_for_file", "first", {"text": str(go_on)})
    server.wait_state("first", "running")
    accepted, refusal = post_until_refused(server, size)
    assert len(accepted) > 3
    check_trouble(server, refusal, "full")
    assert server.http.get(f"/tasks/t{len(accepted)}").status_code == 404
    go_on.touch()
    wait_until(lambda: server.slot()["tasks_done"] == len(accepted) + 1, "every task has run")
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    check_recovery(server, accepted)


def test_tasks_that_filled_the_disk_make_room_when_they_have_run(
    mount: Mount, tmp_path: Path, start_server: StartServer
) -> None:
    """The inputs of what is over are not needed any more: nobody has to come and delete a file."""
    go_on = tmp_path / "go on"
    server = start_server(OGPU_STATE_DIR=mount("size=2m") / "state")
    server.post("waits_for_file", "first", {"text": str(go_on)})
    server.wait_state("first", "running")
    accepted, refusal = post_until_refused(server, 100_000)
    check_trouble(server, refusal, "full")
    go_on.touch()
    check_recovery(server, accepted)


def test_room_that_is_made_is_noticed(
    mount: Mount, tmp_path: Path, start_server: StartServer
) -> None:
    """A full disk, while a task runs; somebody deletes a file, and all is well, by itself."""
    disk, go_on = mount("size=8m"), tmp_path / "go on"
    server = start_server(OGPU_STATE_DIR=disk / "state")
    server.post("waits_for_file", "first", {"text": str(go_on)})
    server.wait_state("first", "running")
    fill(disk / "ballast")
    accepted, refusal = post_until_refused(server, 100_000)
    check_trouble(server, refusal, "full")
    waited = server.http.post("/run/echo/w", json={}, headers={"Prefer": "wait=20"})
    assert waited.json()["type"] == UNAVAILABLE
    (disk / "ballast").unlink()
    wait_until(lambda: server.http.get("/readyz").status_code == 200, "ready again")
    assert server.post("echo", "more").status_code == 202
    go_on.touch()
    check_recovery(server, [*accepted, "more"])


def test_a_request_that_waits_for_a_task_is_told_that_it_was_not_accepted(
    mount: Mount, tmp_path: Path, start_server: StartServer
) -> None:
    """With `Prefer: wait`, too: no 202 for a task that was withdrawn."""
    disk, go_on = mount("size=4m"), tmp_path / "go on"
    server = start_server(OGPU_STATE_DIR=disk / "state")
    server.post("waits_for_file", "first", {"text": str(go_on)})
    server.wait_state("first", "running")
    fill(disk / "ballast")
    body = {"text": "x" * 4_500_000}
    waited = server.http.post("/run/echo/w", json=body, headers={"Prefer": "wait=20"})
    check_trouble(server, waited, "full")
    (disk / "ballast").unlink()
    wait_until(lambda: server.http.get("/readyz").status_code == 200, "ready again")
    go_on.touch()
    check_recovery(server, [])


def test_a_limit_of_file_sizes_is_a_full_disk(tmp_path: Path, start_server: StartServer) -> None:
    """RLIMIT_FSIZE neither ends the service nor loses a task; lifted, it is forgotten."""
    go_on = tmp_path / "go on"
    server = start_server()
    server.post("waits_for_file", "first", {"text": str(go_on)})
    server.wait_state("first", "running")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (2**20, hard))
    accepted, refusal = post_until_refused(server, 100_000)
    check_trouble(server, refusal, "the journal cannot be written")
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    go_on.touch()
    check_recovery(server, accepted)


# --- none, and a large queue


def test_without_a_folder_the_log_says_that_nothing_is_kept(
    tmp_path: Path, start_server: StartServer
) -> None:
    """`:memory:` serves as a folder does, until the end of the process; no file is made."""
    folder = tmp_path / "work"
    folder.mkdir()
    server = start_server(folder=folder, OGPU_STATE_DIR=":memory:")
    assert "OGPU_STATE_DIR=:memory:" in server.log
    assert "a restart of the service loses them" in server.log
    assert server.run("echo", "a")["state"] == "succeeded"
    assert server.task("a")["state"] == "succeeded"
    assert server.stop() == 0
    assert list(folder.iterdir()) == []
    assert (
        start_server(folder=folder, OGPU_STATE_DIR=":memory:").http.get("/tasks/a").status_code
        == 404
    )


@pytest.mark.timeout(180)
def test_ten_thousand_waiting_tasks_cost_little_memory(
    tmp_path: Path, start_server: StartServer
) -> None:
    """100 MB of inputs wait on the disk, not in the memory of the front; then every task runs."""
    go_on, count = tmp_path / "go on", 10_000
    server = start_server(OGPU_QUEUE_SIZE=2 * count)
    server.post("waits_for_file", "first", {"text": str(go_on)})
    server.wait_state("first", "running")
    front = psutil.Process(server.process.pid)
    before = front.memory_info().rss
    host = server.url.removeprefix("http://")
    body = json.dumps({"text": "x" * 10_000})

    def post(numbers: range) -> None:
        client = http.client.HTTPConnection(host, timeout=30)
        for number in numbers:
            client.request("POST", f"/run/echo/t{number}", body)
            response = client.getresponse()
            response.read()
            assert response.status == 202
        client.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(post, (range(start, count, 8) for start in range(8))))
    assert server.workers()["queue_depth"] == count
    grown = front.memory_info().rss - before
    assert grown < 100 * 2**20, f"{grown / 2**20:.0f} MiB"
    go_on.touch()
    wait_until(
        lambda: server.workers()["queue_depth"] == 0, "an empty queue", timeout_s=120, every_s=0.2
    )
    server.wait_state(f"t{count - 1}", "succeeded")
    assert server.stop() == 0
    assert list(server_tasks(server).values()) == ["succeeded"] * (count + 1)
