"""A real server in a real memory cgroup, whose limit its workers hit: told from a ``kill -9``.

The kernel's victim is the largest process in the cgroup: the worker that allocates without end.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import StartServer
from support.cgroups import MemoryCgroup
from support.server import Server
from support.waiting import wait_until

LIMIT_MIB = 300

SOURCE = """
import os, threading
import ogpu.service
from pydantic import BaseModel

class Model(BaseModel):
    text: str = ""

def eat() -> None:
    eaten = []
    while True:
        eaten.append(b"x" * (1 << 20))

@ogpu.service.init()
def load() -> None:
    if os.path.exists("eat in init"):
        eat()

@ogpu.service.expose()
def hungry(data: Model) -> Model:
    eat()
    return data

@ogpu.service.expose()
def hold(data: Model) -> Model:
    with open(data.text) as fifo:  # until somebody writes to it
        return Model(text=fifo.read())

@ogpu.service.expose()
def echo(data: Model) -> Model:
    return data

ogpu.service.start()
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "hungry.py"
    file.write_text(SOURCE, encoding="utf-8")
    return file


@pytest.fixture
def memory_cgroup(nothing_left_over: None) -> Iterator[MemoryCgroup]:
    try:
        cgroup = MemoryCgroup(LIMIT_MIB << 20)
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield cgroup
    cgroup.close()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """What `hold` waits for."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def restarts(server: Server, reason: str) -> int:
    """Read how many workers were replaced for a reason."""
    name = f'ogpu_worker_restarts_total{{reason="{reason}"}} '
    lines = server.http.get("/metrics").text.splitlines()
    return sum(int(float(line.removeprefix(name))) for line in lines if line.startswith(name))


def kill_while_it_holds(server: Server, fifo: Path, address: str) -> dict[str, object]:
    """Have a worker take a task, `kill -9` it, and return the task's error."""
    server.post("hold", address, {"text": str(fifo)})
    pid = server.wait_state(address, "running")["worker"]["pid"]
    with fifo.open("w"):  # the handler was entered: fifo(7) has it wait for the other end
        os.kill(pid, signal.SIGKILL)
    error: dict[str, object] = server.wait_state(address, "failed")["error"]
    return error


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_out_of_memory_is_told_from_a_kill(
    memory_cgroup: MemoryCgroup, start_server: StartServer, source: Path, fifo: Path, method: str
) -> None:
    """Task, slot and metric say which it was; the innocent task beside it goes on."""
    server = start_server(
        command=memory_cgroup.command(source), OGPU_WORKERS=2, OGPU_START_METHOD=method
    )
    server.post("hold", "innocent", {"text": str(fifo)})
    innocent = server.wait_state("innocent", "running")["worker"]["slot"]

    task = server.run("hungry", "guilty")
    assert (task["state"], task["error"]["reason"]) == ("failed", "out_of_memory")
    assert f"ran out of memory (the limit is {LIMIT_MIB} MiB)" in task["error"]["message"]
    assert "raise the memory limit" in task["error"]["message"]
    assert task["error"]["signal"] == signal.SIGKILL
    guilty = server.slot(1 - innocent)
    assert (guilty["last_exit"]["reason"], guilty["last_exit"]["signal"]) == ("out_of_memory", 9)
    assert restarts(server, "out_of_memory") == 1

    fifo.write_text("undisturbed", encoding="utf-8")
    assert server.wait_state("innocent", "succeeded")["result"]["text"] == "undisturbed"

    error = kill_while_it_holds(server, fifo, "killed")
    assert error["reason"] == "worker_died"
    assert "memory" not in str(error["message"])
    slot = server.slot(server.task("killed")["worker"]["slot"])
    assert (slot["last_exit"]["reason"], slot["last_exit"]["signal"]) == ("died", 9)
    assert (restarts(server, "out_of_memory"), restarts(server, "died")) == (1, 1)
    assert server.run("echo", "after", {"text": "well"})["state"] == "succeeded"
    assert server.stop() == 0


def test_every_victim_is_told(
    memory_cgroup: MemoryCgroup, start_server: StartServer, source: Path
) -> None:
    """Workers that eat side by side die one shortly after the other, each of the same reason."""
    server = start_server(command=memory_cgroup.command(source), OGPU_WORKERS=2)
    addresses = [f"t{number}" for number in range(6)]
    for address in addresses:
        server.post("hungry", address)
    ends = [server.wait_state(address, "failed")["error"]["reason"] for address in addresses]
    assert ends == ["out_of_memory"] * len(addresses)
    wait_until(lambda: restarts(server, "out_of_memory") == len(addresses), "metrics")
    assert restarts(server, "died") == 0


def test_an_init_that_runs_out_of_memory_backs_off(
    memory_cgroup: MemoryCgroup, start_server: StartServer, source: Path, fifo: Path
) -> None:
    """In a replacement: it is told, tried again after a wait, and good when memory is enough."""
    server = start_server(command=memory_cgroup.command(source))
    trigger = source.with_name("eat in init")
    trigger.touch()
    assert kill_while_it_holds(server, fifo, "a")["reason"] == "worker_died"
    last_exit = wait_until(
        lambda: (
            server.slot()["last_exit"]["reason"] == "out_of_memory" and server.slot()["last_exit"]
        ),
        "out of memory in @init",
    )
    assert last_exit["signal"] == signal.SIGKILL
    server.wait_log("Slot 0: next try in")
    assert f"ran out of memory (the limit is {LIMIT_MIB} MiB)" in server.log
    assert restarts(server, "out_of_memory") >= 1
    trigger.unlink()
    assert server.run("echo", "b", {"text": "well"})["state"] == "succeeded"


def test_a_first_init_that_runs_out_of_memory_ends_the_start(
    memory_cgroup: MemoryCgroup, start_server: StartServer, source: Path
) -> None:
    """Exit code 3, and the log says why, however soon it happens."""
    source.with_name("eat in init").touch()
    server = start_server(command=memory_cgroup.command(source), wait=False)
    assert server.wait_exit() == 3
    assert "the first worker did not become ready: it ran out of memory (the limit is" in server.log


def test_where_the_count_cannot_be_read_it_is_said(
    start_server: StartServer, source: Path, fifo: Path
) -> None:
    """A container without /sys/fs/cgroup: a SIGKILL is told as what it may have been, too."""
    hide = 'mount -t tmpfs tmpfs /sys/fs/cgroup && exec "$@"'
    unshare = ["unshare", "--mount", "sh", "-c", hide, "sh"]
    probe = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no mount namespace can be made here: {probe.stderr.strip()}")
    enter = f"import os, sys; os.execvp('unshare', [*{unshare}, sys.executable, *sys.argv[1:]])"
    server = start_server(command=["-c", enter, "-X", "dev", "-W", "error", str(source)])
    error = kill_while_it_holds(server, fifo, "a")
    assert error["reason"] == "worker_died"
    why = "was ended by SIGKILL (whether it ran out of memory cannot be told: cannot read /sys/fs/"
    assert why in str(error["message"])
    assert why in server.log
    assert server.slot()["last_exit"]["reason"] == "died"
