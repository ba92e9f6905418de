"""Each worker has a folder of its own for temporary files, which goes with it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from conftest import StartServer
from support.server import Server
from support.waiting import wait_until

SOURCE = """
import os, tempfile, time
before = tempfile.gettempdir()  # remembered by the module, from now on
import ogpu.service
from pydantic import BaseModel

class Data(BaseModel):
    text: str = ""

def leave():
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(b"x" * 1000)
    os.makedirs(os.path.join(tempfile.mkdtemp(), "deep", "deeper"))
    return file.name

@ogpu.service.expose()
def leaves(data: Data) -> Data:
    return Data(text=leave())

@ogpu.service.expose(timeout=0.5)
def leaves_and_hangs(data: Data) -> Data:
    print(leave(), flush=True)
    time.sleep(3600)

ogpu.service.start()
"""


def folders(place: Path) -> list[Path]:
    """Return the folders of workers; a standby has one by another name."""
    return sorted(place.glob("ogpu-*/[0-9]*-*"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "tmp"
    place.mkdir()
    return place


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_folder_goes_with_its_worker(start_server: StartServer, place: Path, method: str) -> None:
    """TMPDIR is the worker's own; what a hung handler left is removed; the others' stays."""
    server = start_server(SOURCE, OGPU_WORKERS=2, TMPDIR=place, OGPU_START_METHOD=method)
    wait_until(lambda: server.slot(1)["state"] == "ready", "both are ready")
    assert [folder.name for folder in folders(place)] == ["0-1", "1-1"]
    task = server.run("leaves", "a")
    path = Path(task["result"]["text"])
    mine = folders(place)[task["worker"]["slot"]]
    assert path.is_relative_to(mine)
    assert path.exists()
    hung = server.run("leaves_and_hangs", "b")
    left = Path(hung["error"]["output"])
    wait_until(lambda: not left.exists(), "what it left is gone")
    wait_until(lambda: len(folders(place)) == 2, "its successor has a folder")
    assert path.exists() == (hung["worker"]["slot"] != task["worker"]["slot"])
    assert server.stop() == 0
    assert list(place.iterdir()) == []


def killed(server: Server) -> None:
    server.process.kill()
    assert server.wait_exit() == -signal.SIGKILL


def test_nothing_is_left_when_the_front_is_killed(start_server: StartServer, place: Path) -> None:
    """The template removes the folders when it has ended the workers."""
    server = start_server(SOURCE, TMPDIR=place)
    server.run("leaves", "a")
    killed(server)
    wait_until(lambda: list(place.iterdir()) == [], "nothing left")


def test_the_next_start_removes_what_killed_ones_left(
    start_server: StartServer, place: Path
) -> None:
    """Front and template killed at once: their folder is removed, and nobody else's."""
    foreign = [place / "ogpu-foreign", place / "mine"]
    for folder in foreign:
        folder.mkdir()
    alive = start_server(SOURCE, TMPDIR=place)
    dead = start_server(SOURCE, TMPDIR=place)
    dead.run("leaves", "a")
    worker = dead.slot()["pid"]
    template = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(template, signal.SIGSTOP)  # so that it cannot clean up
    dead.process.send_signal(signal.SIGSTOP)
    os.kill(template, signal.SIGKILL)
    killed(dead)
    assert len(list(place.glob("ogpu-*/lock"))) == 2
    third = start_server(SOURCE, TMPDIR=place)
    assert len(list(place.glob("ogpu-*/lock"))) == 2
    assert alive.run("leaves", "a")["state"] == "succeeded"
    assert alive.stop() == 0
    assert third.stop() == 0
    assert sorted(place.iterdir()) == sorted(foreign)


def test_folders_of_replaced_templates_and_failed_starts_are_removed(
    start_server: StartServer, place: Path
) -> None:
    server = start_server(SOURCE, TMPDIR=place, OGPU_WORKERS=2)
    wait_until(lambda: server.slot(1)["state"] == "ready", "both are ready")
    parent = Path(f"/proc/{server.slot()['pid']}/stat").read_text().rpartition(")")[2].split()[1]
    os.kill(int(parent), signal.SIGKILL)
    wait_until(
        lambda: [f.name for f in folders(place)] == ["0-2", "1-2"], "the next generation's alone"
    )
    assert server.run("leaves", "a")["state"] == "succeeded"


def test_without_a_place_workers_have_none(start_server: StartServer, tmp_path: Path) -> None:
    """A read-only system: a line in the log, and everything else works."""
    server = start_server(TMPDIR="/proc/nowhere", PYTHONPATH=no_temp_folder(tmp_path))
    assert server.run("echo", "a")["state"] == "succeeded"
    server.wait_log("Workers have no folders of their own for temporary files")


def no_temp_folder(tmp_path: Path) -> Path:
    """Return a folder with a sitecustomize that leaves the interpreter no place to write to."""
    folder = tmp_path / "site"
    folder.mkdir()
    code = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc/nowhere']\n"
    (folder / "sitecustomize.py").write_text(code)
    return folder
