"""What docker/ describes, run as a container: not root, read-only, 64 KiB of /dev/shm, as PID 1."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.container import SHM_BYTES, Container
from support.image import Dockerfile, compose_service, seconds
from support.processes import is_gone, is_standby, zombies
from support.server import SOURCES
from support.waiting import wait_until

StartContainer = Callable[..., Container]

AS_PID_ONE: list[str] = []
# What Docker runs for `init: true` is tini; dumb-init comes with the tests, and is told to behave
# like it (signals go to its child alone).
INITS = [[str(Path(sys.prefix, "bin", "dumb-init")), "--single-child", "--"]]
if tini := shutil.which("tini"):
    INITS.append([tini, "--"])


@pytest.fixture(scope="module", autouse=True)
def namespaces() -> None:
    make = ["unshare", "--pid", "--mount", "--net", "--ipc", "--uts", "--fork"]
    mount = ["sh", "-c", "mount -t tmpfs tmpfs /mnt && setpriv --reuid=10001 true"]
    tried = subprocess.run([*make, *mount], check=False, capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"no container can be made here: {tried.stderr}")


@pytest.fixture
def start_container(tmp_path: Path, nothing_left_over: None) -> Iterator[StartContainer]:
    """Start containers of a source, all of them with the same volumes; end them after the test."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(SOURCES / "zoo.py", source / "main.py")
    volumes = {}
    for at in ("/state", "/models"):
        volumes[at] = tmp_path / at[1:]
        volumes[at].mkdir(mode=0o700)
        os.chown(volumes[at], *map(int, Dockerfile("cpu").one("USER").split(":")))
    containers: list[Container] = []

    def start(
        *, init: list[str] = AS_PID_ONE, with_tmp: bool = True, **settings: object
    ) -> Container:
        texts = {name: str(value) for name, value in settings.items()}
        folder = tmp_path / f"container{len(containers)}"
        container = Container(folder, source, volumes, texts, init=init, with_tmp=with_tmp)
        containers.append(container)
        return container

    yield start
    for container in containers:
        container.close()


def names(container: Container) -> list[str]:
    return [" ".join(process.cmdline()) for process in container.processes()]


@pytest.mark.parametrize(
    "init", [AS_PID_ONE, *INITS], ids=lambda init: Path([*init, "pid one"][0]).name
)
def test_the_life_of_a_container(
    start_container: StartContainer, tmp_path: Path, init: list[str]
) -> None:
    """It is unhealthy until its model is loaded; it kills, reaps, drains and ends, as anywhere."""
    container = start_container(init=init, ZOO_INIT_WAITS_FOR="/models/weights")
    container.wait_log("Workers are made by")
    code, words = container.healthcheck()
    assert (code, "Connection refused" in words) == (1, True), words
    (tmp_path / "models" / "weights").touch()
    container.wait_ready()
    assert container.healthcheck()[0] == 0

    task = container.run("hangs_with_family", "family", text="/tmp/pids")
    assert task["state"] == "timed_out"
    assert len(container.path("/tmp/pids").read_text().split()) == 4
    orphans = "for i in 1 2 3; do (sleep 0.05; true) & done"
    assert container.execute("sh", "-c", orphans).returncode == 0
    container.wait_ready()
    # PID 1, the template and a worker; and the front, where an init is PID 1. And the standby.
    expected = 3 + bool(init)

    def nothing_else() -> bool:
        return len([p for p in container.processes() if not is_standby(p)]) == expected

    wait_until(nothing_else, "nothing else is left")
    assert all(zombies(process.pid) == [] for process in container.processes())

    container.call("POST", "/run/sleep/last", {"number": 0.3})
    wait_until(lambda: container.state_of("last") == "running", "it runs")
    grace_s = seconds(compose_service("cpu")["stop_grace_period"])
    assert container.stop(grace_s) == 0
    drained = container.log.rpartition("SIGTERM: draining")[2]
    assert "[last] Function: `sleep` completed successfully" in drained


def test_a_source_has_the_rights_that_the_files_say(start_container: StartContainer) -> None:
    """The claims of docker/README.md, as a handler sees them; if they fail, nothing is tested."""
    container = start_container().wait_ready()

    numbers = itertools.count()

    def fact(expression: str) -> str:
        task = container.run("facts", f"fact{next(numbers)}", text=expression)
        assert task["state"] == "succeeded", task["error"]
        return str(task["result"]["text"])

    assert fact("os.getresuid() + os.getresgid()") == str((10001,) * 6)
    status = fact("open('/proc/self/status').read()").replace("\t", " ")
    assert "NoNewPrivs: 1" in status
    for capabilities in ("CapEff", "CapPrm", "CapBnd", "CapInh"):
        assert f"{capabilities}: 0000000000000000" in status
    assert fact("os.statvfs('/dev/shm').f_blocks * os.statvfs('/dev/shm').f_frsize") == str(
        SHM_BYTES
    )
    assert fact("os.environ['HOME'] + os.getcwd()") == "/models/source"
    writable = (
        "[p for p in ('/', '/usr', '/source', '/state', '/models', '/tmp') if os.access(p, 2)]"
    )
    assert fact(writable) == "['/state', '/models', '/tmp']"
    assert fact("os.statvfs('/').f_flag & os.ST_RDONLY") == "1"
    assert fact("os.environ['TMPDIR']").startswith("/tmp/ogpu-")
    assert fact("open('/proc/self/oom_score_adj').read()") == "500\n"


def test_another_container_carries_on(start_container: StartContainer) -> None:
    """SIGKILL of PID 1 leaves no process; what was accepted is run by the next on that volume."""
    first = start_container().wait_ready()
    first.call("POST", "/run/family/interrupted", {"text": "/tmp/pids"})
    wait_until(lambda: _lines(first.path("/tmp/pids")) == 4, "a family")
    assert first.call("POST", "/run/echo/queued", {"text": "kept"}).status_code == 202
    everything = first.processes()
    assert len(everything) >= 3 + 4
    first.kill()
    wait_until(lambda: all(is_gone(process.pid) for process in everything), "nothing is left")

    second = start_container(OGPU_WORKERS=2).wait_ready()
    wait_until(lambda: second.state_of("queued") == "succeeded", "the queued task is run")
    task = second.call("GET", "/tasks/interrupted").json()
    assert (task["state"], task["attempt"]) == ("running", 2)


def _lines(file: Path) -> int:
    return len(file.read_text().split()) if file.exists() else 0


def test_without_a_place_for_temporary_files(start_container: StartContainer) -> None:
    """A read-only root without /tmp, and a home that is nowhere: the service itself needs none.

    Nor do spawned workers, each of which is a fresh interpreter.
    """
    container = start_container(
        with_tmp=False, HOME="/nonexistent", OGPU_START_METHOD="spawn"
    ).wait_ready()
    assert "no folders of their own for temporary files" in container.log
    task = container.run("hangs_in_c", "a")
    assert (task["state"], "in hangs_in_c" in task["error"]["stack"]) == ("timed_out", True)
    assert container.run("echo", "b", text="fine")["result"]["text"] == "fine"
    assert container.stop() == 0


def test_a_volume_that_cannot_be_written_is_explained(
    start_container: StartContainer, tmp_path: Path
) -> None:
    """A folder of the host belongs to somebody else: the message says whose it has to be."""
    os.chown(tmp_path / "state", 0, 0)
    container = start_container()
    assert container.process.wait(20) == 2
    assert "OGPU_STATE_DIR=/state: Permission denied" in container.log
    assert "user 10001" in container.log
    assert "Traceback" not in container.log


def test_the_default_state_folder_in_a_read_only_container_is_explained(
    start_container: StartContainer,
) -> None:
    container = start_container(OGPU_STATE_DIR="")
    assert container.process.wait(20) == 2
    assert "OGPU_STATE_DIR=/source/ogpu-state: Read-only file system" in container.log
    assert "volume" in container.log
    assert "Traceback" not in container.log
