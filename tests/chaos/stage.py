"""Where the faults are played: one server, its receiver, its folders, and who lives there."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from support.processes import descendants, is_gone
from support.server import SOURCES, Server
from support.sink import Sink
from support.waiting import wait_until

WORKERS = 2
TERMINAL = ("succeeded", "failed", "timed_out", "cancelled", "expired")
# A defect that the service caught and logged.
_COMPLAINTS = ("of the pool failed", "Exception in callback", "never retrieved", "has a defect")


class Stage:
    """A server with the source chaos.py; it is used by row after row, until one fails."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.place, self.temp = folder / "chaos", folder / "tmp"
        (self.place / "init").mkdir(parents=True)
        self.temp.mkdir()
        self.sink = Sink()
        environment = {
            "CHAOS_DIR": self.place, "TMPDIR": self.temp, "CALLBACK_URL": self.sink.url,
            "OGPU_STATE_DIR": folder / "state", "OGPU_WORKERS": WORKERS, "OGPU_INIT_TIMEOUT": 30,
            "OGPU_CRASH_BUDGET": 100_000, "OGPU_MAX_ATTEMPTS": 100, **settings,
        }  # fmt: skip
        self.server = Server(
            [str(SOURCES / "chaos.py")],
            folder,
            folder / "server.log",
            {name: str(value) for name, value in environment.items()},
        )
        self.front = psutil.Process(self.server.process.pid)
        self.port = self.rss_at_first = 0

    def open(self) -> None:
        """Wait for all workers, and let everything happen once that happens once."""
        self.server.wait_ready()
        self.port = int(self.server.url.rpartition(":")[2])
        self.wait_whole()
        body = {"size_bytes": 2**20}
        for number in range(4):
            self.server.run("act", f"warm-{number}", body)
        self.sink.wait_for(4)
        self.server.http.get("/tasks?limit=1").raise_for_status()  # FastAPI is imported
        self.rss_at_first = self.front.memory_info().rss

    def close(self) -> None:
        """Stop it, and look at what is left."""
        try:
            self.stop()
            wait_until(lambda: not descendants(), "no process is left", 5)
        finally:
            self.give_up()

    def stop(self) -> None:
        """Stop it as an operator does."""
        assert self.server.stop() == 0, self.server.log
        assert [p.name for p in self.temp.iterdir()] == []
        log = self.server.log
        assert [complaint for complaint in _COMPLAINTS if complaint in log] == [], log

    def give_up(self) -> None:
        """End it, whatever is left of it."""
        below = self.below()
        self.server.close()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.sink.close()

    # --- who is there

    def below(self) -> list[psutil.Process]:
        """Return the processes below the front; it is a subreaper, so none escapes from there."""
        try:
            found = self.front.children(recursive=True)
            return [process for process in found if not is_gone(process.pid)]
        except psutil.NoSuchProcess:
            return []

    @property
    def template(self) -> int:
        """Return the pid of the template that there is now."""
        # One that was killed again and again is made again later and later.
        return wait_until(self.find_template, "a template", 40)

    def find_template(self) -> int | None:
        for child in self.front.children():
            with contextlib.suppress(psutil.Error):
                if "template" in child.name() or "template_main" in "".join(child.cmdline()):
                    return child.pid
        return None

    def pool(self) -> list[dict[str, Any]]:
        slots: list[dict[str, Any]] = self.server.workers()["workers"]
        return slots

    def is_whole(self) -> bool:
        return all(slot["state"] == "ready" for slot in self.pool())

    def wait_whole(self, timeout_s: float = 30) -> None:
        wait_until(self.is_whole, "every slot is ready", timeout_s)

    def wait_replaced(self, pid: int) -> None:
        wait_until(lambda: pid not in [s["pid"] for s in self.pool()], f"{pid} is replaced")

    # --- files between the source and us

    def mark(self, address: str, kind: str) -> Path:
        return self.place / f"{address}.{kind}"

    def tell_go(self, address: str) -> None:
        self.mark(address, "go").touch()

    def wait_mark(self, address: str, *kinds: str, pid: int | None = None) -> None:
        """Wait for one of the marks; with a pid also for that process's end, or stop."""
        wait_until(
            lambda: (
                any(self.mark(address, kind).exists() for kind in kinds)
                or (pid is not None and (is_gone(pid) or is_stopped(pid)))
            ),
            f"{address}: {kinds}",
        )

    # --- tasks

    def end_of(self, address: str) -> dict[str, Any] | None:
        """Return a task that has ended."""
        response = self.server.http.get(f"/tasks/{address}")
        task: dict[str, Any] = response.json()
        return task if response.status_code == 200 and task["state"] in TERMINAL else None

    def wait_end(self, address: str, timeout_s: float = 15) -> dict[str, Any]:
        task = wait_until(lambda: self.end_of(address), f"{address} has ended", timeout_s)
        assert task is not None
        return task

    def send_raw(self, method: str, path: str, body: object = None, headers: str = "") -> Client:
        """Send a request and wait for nothing: the front may be stopped, or we leave."""
        client = Client(self.port)
        data = json.dumps({} if body is None else body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: h\r\ncontent-length: {len(data)}\r\n{headers}"
        client.sendall(head.encode() + b"\r\n" + data)
        return client

    @contextlib.contextmanager
    def paused(self, pid: int) -> Iterator[None]:
        """Stop a process, and let it go on whatever happens."""
        stop(pid)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class Client(socket.socket):
    """A client on a raw socket."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.settimeout(15)
        self.connect(("127.0.0.1", port))

    def read_status(self) -> int:
        """Return the status of the answer."""
        line = b""
        while not line.endswith(b"\r\n"):
            byte = self.recv(1)
            assert byte, f"closed after {line!r}"
            line += byte
        return int(line.split()[1])


def is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def stop(pid: int) -> None:
    """Stop a process, and return when it has stopped (or is gone)."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(pid) or is_gone(pid), f"{pid} has stopped")


def post(port: int, function: str, address: str, body: object, wait_s: int = 60) -> dict[str, Any]:
    """Run a task as a client of its own, and return it when it has ended."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=wait_s + 5)) as connection:
        headers = {"Prefer": f"wait={wait_s}"}
        connection.request("POST", f"/run/{function}/{address}", json.dumps(body), headers)
        response = connection.getresponse()
        task: dict[str, Any] = json.loads(response.read())
        assert response.status == 200, (response.status, task)
        return task
