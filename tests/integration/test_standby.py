"""The standby: an interpreter that waits, so that a kill costs @init and not the import."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from conftest import StartServer
from ogpu.service.devices.cores import allowed_cores
from support.gpus import StandInGpus
from support.processes import is_gone, is_standby, open_descriptors
from support.waiting import wait_until

SOURCE = """
import os, tempfile, time
import ogpu.service
from pydantic import BaseModel

class Data(BaseModel):
    text: str = ""

def note(what):
    with open({notes!r}, "a") as notes:
        notes.write(f"{{what}} {{os.getpid()}}\\n")

note("imports")
kept_file = tempfile.mkstemp()[1]
at_import = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]
while os.path.exists({hold!r}):
    time.sleep(0.01)
if "SOURCE_OPENS_A_GPU" in os.environ:
    import ogpu.service.worker.hazards
    ogpu.service.worker.hazards.open_gpu_device = lambda: "/dev/nvidia0"
if os.path.exists({broken!r}):
    raise RuntimeError("the licence server is down")

@ogpu.service.expose()
def where(data: Data) -> Data:
    variables = os.environ["CUDA_VISIBLE_DEVICES"] + " " + os.environ["OMP_NUM_THREADS"]
    return Data(text=f"{{os.getpid()}} {{tempfile.gettempdir()}} {{variables}}")

@ogpu.service.expose()
def imported(data: Data) -> Data:
    return Data(text=f"{{os.getpid()}} {{kept_file}} {{at_import[0]}} {{at_import[1]}}")

@ogpu.service.expose()
def dies(data: Data) -> Data:
    os.kill(os.getpid(), 9)

note("imported")
ogpu.service.start()
"""


METHODS = pytest.mark.parametrize("method", ["fork", "spawn"])


class Service:
    """A server that spawns its workers, or forks them, and the processes that it has."""

    def __init__(
        self, start_server: StartServer, folder: Path, method: str = "spawn", **settings: object
    ) -> None:
        self.method = method
        self.hold, self.broken = folder / "hold", folder / "broken"
        self.notes = folder / "notes"
        paths = {"notes": self.notes, "hold": self.hold, "broken": self.broken}
        source = SOURCE.format(**{name: str(path) for name, path in paths.items()})
        defaults = {"OGPU_START_METHOD": method, "OGPU_GPUS": "none"}
        self.server = start_server(source, **{**defaults, **settings})
        if method == "fork":  # there is none before the first worker has been replaced
            assert self.standbys() == []
            self.kill_worker()
            self.wait_whole()

    def template(self) -> int:
        return int(re.findall(r"template: pid (\d+)", self.server.log)[-1])

    def standbys(self) -> list[int]:
        children = psutil.Process(self.template()).children()
        found = [child.pid for child in children if is_standby(child)]
        # One that has become a worker has the other name for a moment longer.
        workers = [slot["pid"] for slot in self.server.workers()["workers"]] if found else []
        return [pid for pid in found if pid not in workers]

    def wait_standby(self, what: str = "imported") -> int:
        """Return the one that has imported the source, or only begun with that; or was forked."""
        (standby,) = wait_until(self.standbys, "a standby")
        if self.method == "fork":
            return standby
        wait_until(lambda: f"{what} {standby}\n" in self.notes.read_text(), f"it {what} it")
        return standby

    def kill_worker(self, index: int = 0) -> int:
        """Have the worker of a slot end, and return the pid of the next one."""
        before = self.server.slot(index)
        os.kill(before["pid"], signal.SIGKILL)
        wait_until(
            lambda: self.server.slot(index)["generation"] > before["generation"], "another one"
        )
        return int(wait_until(lambda: self.server.slot(index)["pid"], "its pid"))

    def wait_whole(self) -> None:
        def whole() -> bool:
            return all(slot["state"] == "ready" for slot in self.server.workers()["workers"])

        wait_until(whole, "every worker is ready")

    def imports_of(self, pid: int) -> int:
        return self.notes.read_text().split("\n").count(f"imports {pid}")

    def imports(self) -> int:
        return self.notes.read_text().count("imports ")


@pytest.fixture
def start(start_server: StartServer, tmp_path: Path) -> Callable[..., Service]:
    return lambda **settings: Service(start_server, tmp_path, **settings)


@METHODS
def test_it_takes_the_place_of_a_worker(start: Callable[..., Service], method: str) -> None:
    """A task's worker dies; the next task runs in the standby, which has what a worker of the slot
    has: its own folder for temporary files, its variables, and no descriptor more than another
    worker. Then there is another standby.
    """
    service = start(method=method)
    server = service.server
    descriptors = open_descriptors(server.slot()["pid"])
    first = server.slot()["generation"] + 1
    for generation in (first, first + 1):
        standby = service.wait_standby()
        assert [slot["pid"] for slot in server.workers()["workers"]] != [standby]
        assert server.run("dies", f"dies-{generation}")["error"]["reason"] == "worker_died"
        found = server.run("where", f"where-{generation}")["result"]["text"].split()
        assert found[0] == str(standby)
        assert found[1].endswith(f"/0-{generation}")
        assert found[2:] == ["-1", str(allowed_cores())]
        assert service.imports_of(standby) == (1 if method == "spawn" else 0)
        assert open_descriptors(standby) == descriptors
    assert server.stop() == 0


def test_it_imports_the_source_as_a_worker_does(start: Callable[..., Service]) -> None:
    """It sees no GPU where there is to be none, and has a worker's share of the cores; temporary
    files go with the worker.
    """
    service = start()
    standby = service.wait_standby()
    service.kill_worker()
    pid, file, *variables = service.server.run("imported", "a")["result"]["text"].split()
    assert (pid, *variables) == (str(standby), "-1", str(allowed_cores()))
    assert Path(file).exists()
    service.kill_worker()
    wait_until(lambda: not Path(file).parent.exists(), "its folder is removed")


def test_one_that_has_opened_a_gpu_starts_again(
    start: Callable[..., Service], tmp_path: Path
) -> None:
    """Its context is bound to the device that was visible: where the order names another one."""
    gpus = StandInGpus(tmp_path, 2).environment
    service = start(SOURCE_OPENS_A_GPU=1, OGPU_GPUS="auto", **gpus)
    for index, imports in ((1, 2), (0, 1)):
        standby = service.wait_standby()
        assert service.kill_worker(index) == standby
        service.wait_whole()
        assert service.imports_of(standby) == imports


def test_it_is_used_before_it_has_imported_the_source(start: Callable[..., Service]) -> None:
    """It is ahead of an interpreter that would be started now."""
    service = start(OGPU_STANDBY=1)
    service.wait_standby()
    service.hold.touch()
    service.kill_worker()
    standby = service.wait_standby("imports")
    assert service.kill_worker() == standby
    service.hold.unlink()
    assert service.server.run("where", "a")["result"]["text"].startswith(f"{standby} ")


@METHODS
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_is_killed_or_stopped(
    start: Callable[..., Service], number: int, method: str
) -> None:
    """The next worker is another process; the one after it has a standby again."""
    service = start(method=method)
    standby = service.wait_standby()
    os.kill(standby, number)
    if number == signal.SIGKILL:
        service.server.wait_log("The standby is lost; the next worker starts afresh: it was ended")
        assert service.standbys() == []
    else:
        wait_until(lambda: psutil.Process(standby).status() == "stopped", "it is stopped")
    assert service.kill_worker() != standby
    assert service.server.run("where", "a")["state"] == "succeeded"
    assert is_gone(standby)
    assert service.wait_standby() == service.kill_worker()
    assert service.server.stop() == 0


def test_one_that_cannot_import_the_source(start: Callable[..., Service]) -> None:
    """The log has the traceback; none is made again until a worker has been made."""
    service = start()
    service.wait_standby()
    before = service.imports()
    service.broken.touch()
    service.kill_worker()
    service.server.wait_log("RuntimeError: the licence server is down")
    assert "The standby is lost" in service.server.log
    assert service.server.run("where", "a")["state"] == "succeeded"
    assert service.imports() == before + 1
    assert service.standbys() == []
    service.broken.unlink()
    service.kill_worker()
    service.wait_standby()
    assert service.imports() == before + 3


@METHODS
def test_it_ends_with_its_template(start: Callable[..., Service], method: str) -> None:
    service = start(method=method)
    standby, template = service.wait_standby(), service.template()
    os.kill(template, signal.SIGKILL)
    wait_until(lambda: is_gone(standby), "the standby is gone", 5)
    wait_until(lambda: service.template() != template, "another template")
    assert service.server.run("where", "a")["state"] == "succeeded"
    assert service.wait_standby() != standby


@METHODS
def test_there_is_none(start: Callable[..., Service], method: str) -> None:
    """Where it is turned off."""
    service = start(method=method, OGPU_STANDBY=0)
    service.kill_worker()
    assert service.server.run("where", "a")["state"] == "succeeded"
    (worker,) = psutil.Process(service.template()).children()
    assert worker.pid == service.server.slot()["pid"]
