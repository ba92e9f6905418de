"""The template is killed, stopped, or cannot be made again, while the front serves on."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import pytest

from conftest import StartServer
from support.processes import is_gone, open_descriptors, zombies
from support.server import Server
from support.waiting import wait_until

_TEMPLATE = re.compile(r"Workers are made by (\w+) \(template: pid (\d+)\)")


def templates(server: Server) -> list[tuple[str, int]]:
    """Return the method and the pid of each template that was ready."""
    return [(method, int(pid)) for method, pid in _TEMPLATE.findall(server.log)]


def whole(server: Server) -> bool:
    return all(slot["state"] == "ready" for slot in server.workers()["workers"])


def wait_whole(server: Server) -> None:
    wait_until(lambda: whole(server), "every worker is ready", 20)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_killed_template_is_replaced(
    start_server: StartServer, tmp_path: Path, method: str
) -> None:
    """The front serves on; what ran runs again; nothing of the old workers is left."""
    server = start_server(OGPU_WORKERS=2, OGPU_START_METHOD=method)
    wait_whole(server)
    pids = tmp_path / "pids"
    server.post("family", "family", {"text": str(pids)})
    server.post("waits_for_file", "waits", {"text": str(tmp_path / "go")})
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 4, "a family")
    ((_, template),) = templates(server)
    old = [slot["pid"] for slot in server.workers()["workers"]]
    family = [int(pid) for pid in pids.read_text().split()]
    os.kill(template, signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, [*old, *family, template])), "all of them gone")
    assert server.http.get("/healthz").status_code == 200
    (tmp_path / "go").touch()
    task = server.wait_state("waits", "succeeded", 20)
    assert task["attempt"] == 2
    assert server.http.delete("/tasks/family").status_code == 200
    wait_whole(server)
    assert server.run("echo", "a", {"text": "on"})["result"]["text"] == "on"
    wait_until(lambda: [m for m, _ in templates(server)] == [method] * 2, "the same method")
    exits = [slot["last_exit"]["reason"] for slot in server.workers()["workers"]]
    assert "template_died" in exits
    assert zombies(server.process.pid) == []
    assert server.stop() == 0


def test_templates_that_are_killed_again_and_again(start_server: StartServer) -> None:
    """Each is replaced, no descriptor is left of it, and the crash budget is not touched."""
    server = start_server(OGPU_WORKERS=2, OGPU_CRASH_BUDGET=3)
    wait_whole(server)
    descriptors = open_descriptors(server.process.pid)
    for number in range(8):
        template = templates(server)[-1][1]
        os.kill(template, signal.SIGKILL)
        wait_until(lambda: templates(server)[-1][1] != template, "another template")  # noqa: B023
        assert server.run("echo", f"a{number}")["state"] == "succeeded"
        wait_whole(server)
    assert open_descriptors(server.process.pid) <= descriptors + 1
    assert server.stop() == 0


def test_a_stopped_template_is_replaced(start_server: StartServer) -> None:
    """SIGSTOP: nothing would be launched or buried any more. It is seen within seconds."""
    server = start_server()
    template = templates(server)[-1][1]
    os.kill(template, signal.SIGSTOP)
    server.post("hangs_asleep", "hung")
    assert server.wait_state("hung", "timed_out")["error"]["signal"] == signal.SIGKILL
    assert server.run("echo", "a", {"text": "on"})["result"]["text"] == "on"
    wait_until(lambda: templates(server)[-1][1] != template, "another template in the log")
    assert is_gone(template)


def test_a_stopped_template_does_not_outlive_its_front(start_server: StartServer) -> None:
    """The kernel continues it when the front dies, and it ends its workers."""
    server = start_server()
    worker, template = server.slot()["pid"], templates(server)[-1][1]
    os.kill(template, signal.SIGSTOP)
    server.process.kill()
    server.wait_exit()
    wait_until(lambda: is_gone(worker) and is_gone(template), "nothing left", 5)


def test_a_task_that_kills_its_template_ends(start_server: StartServer) -> None:
    """It runs OGPU_MAX_ATTEMPTS times, and then fails alone; the service goes on."""
    server = start_server(OGPU_MAX_ATTEMPTS=2, OGPU_CRASH_BUDGET=2)
    task = server.run("kills_its_parent", "poison")
    assert (task["state"], task["attempt"]) == ("failed", 2)
    assert task["error"]["reason"] == "interrupted"
    assert server.run("echo", "a")["state"] == "succeeded"


SOURCE_OF_TWO_MINDS = """
import os, sys
import ogpu.service
from pydantic import BaseModel

class Data(BaseModel):
    text: str = ""

if os.path.exists({path!r}) and __name__ == "__mp_main__":
    {fault}

@ogpu.service.expose()
def echo(data: Data) -> Data:
    return data

ogpu.service.start()
"""


def test_a_source_that_cannot_be_imported_again(start_server: StartServer, tmp_path: Path) -> None:
    """The next template spawns its workers; each says what is wrong, and the budget ends that."""
    marker = tmp_path / "broken"
    fault = "raise RuntimeError('the licence server is down')"
    source = SOURCE_OF_TWO_MINDS.format(path=str(marker), fault=fault)
    server = start_server(source, OGPU_CRASH_BUDGET=3)
    marker.touch()
    os.kill(templates(server)[-1][1], signal.SIGKILL)
    server.wait_log("cannot be imported again (RuntimeError: the licence server is down)")
    assert server.wait_exit() == 4
    assert "3 starts of workers failed" in server.log


def test_an_import_that_hangs_in_another_template(
    start_server: StartServer, tmp_path: Path
) -> None:
    """OGPU_INIT_TIMEOUT ends it; templates that never lead to a worker use the budget up."""
    marker = tmp_path / "broken"
    source = SOURCE_OF_TWO_MINDS.format(path=str(marker), fault="import time; time.sleep(3600)")
    server = start_server(source, OGPU_CRASH_BUDGET=2, OGPU_INIT_TIMEOUT=1)
    marker.touch()
    os.kill(templates(server)[-1][1], signal.SIGKILL)
    assert server.wait_exit() == 4
    assert "has not imported the source within OGPU_INIT_TIMEOUT" in server.log


def test_a_hazard_in_another_template_is_told(start_server: StartServer, tmp_path: Path) -> None:
    """A thread at the second import: the workers of the next template are spawned, with the why."""
    marker = tmp_path / "threads"
    fault = "import threading, time; threading.Thread(target=time.sleep, args=(9e9,), daemon=True, "
    fault += "name='late').start()"
    source = SOURCE_OF_TWO_MINDS.format(path=str(marker), fault=fault.replace("9e9", "1e6"))
    server = start_server(source)
    assert templates(server)[-1][0] == "fork"
    marker.touch()
    os.kill(templates(server)[-1][1], signal.SIGKILL)
    server.wait_log("the source started threads while it was imported (late)")
    assert server.run("echo", "a", {"text": "on"})["result"]["text"] == "on"
    wait_until(lambda: templates(server)[-1][0] == "spawn", "the method in the log")


def test_a_wanted_start_method_stays(start_server: StartServer, tmp_path: Path) -> None:
    """OGPU_START_METHOD=fork overrides the checks, in the next template, too."""
    marker = tmp_path / "threads"
    fault = "import threading, time; threading.Thread(target=time.sleep, args=(1e6,), daemon=True)"
    source = SOURCE_OF_TWO_MINDS.format(path=str(marker), fault=fault + ".start()")
    server = start_server(source, OGPU_START_METHOD="fork")
    marker.touch()
    os.kill(templates(server)[-1][1], signal.SIGKILL)
    assert server.run("echo", "a", {"text": "on"})["result"]["text"] == "on"
    wait_until(lambda: [m for m, _ in templates(server)] == ["fork"] * 2, "the same method")


def test_the_template_dies_while_clients_wait(start_server: StartServer) -> None:
    """Clients that wait get their result, from the next attempt."""
    server = start_server(OGPU_WORKERS=2)
    answers: list[str] = []

    def send(number: int) -> None:
        answers.append(server.run("sleep", f"a{number}", {"number": 0.5})["state"])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(s["state"] == "busy" for s in server.workers()["workers"]), "both work")
    os.kill(templates(server)[-1][1], signal.SIGKILL)
    for thread in threads:
        thread.join(30)
    assert answers == ["succeeded"] * 4
