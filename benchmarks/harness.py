"""Start a server as its own process, talk HTTP to it, and end it, with a limit on every wait."""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"
SOURCES = Path(__file__).parent / "sources"
START_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0
ANSWER_LIMIT_S = 60.0
_LOG_TAIL_BYTES = 4000


class BenchmarkError(Exception):
    """What was to be measured did not happen, so there is no figure."""


def run(main: Callable[[], None]) -> None:
    """Run a benchmark; end its servers on SIGTERM, too (a SIGKILL leaves them behind)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except BenchmarkError as error:
        raise SystemExit(f"No figures: {error}") from error


class Server:
    """A server process that listens on ``port``; what it logs goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes], pidfd: int, port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self._pidfd = pidfd
        self._log = log

    @property
    def folder(self) -> Path:
        """The folder in which it runs; it is gone when the server is."""
        return self._log.parent

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, self.port, timeout=ANSWER_LIMIT_S)

    def log_tail(self) -> str:
        return self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")

    def with_log(self, message: str) -> str:
        """Put the last thing that was logged into the first line, and more of it below."""
        log = self.log_tail().strip()
        return f"{message}; its log ends with: {log.splitlines()[-1] if log else 'nothing'}\n{log}"

    def see_alive(self) -> None:
        """Raise BenchmarkError where its main process has ended."""
        if _has_ended(self._pidfd, 0):
            raise BenchmarkError(self.with_log("the server has ended"))

    def kill(self) -> None:
        """End it and all that it has started at once: nobody who hangs is waited for."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGKILL)  # not waited for yet: the number is its own
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def wait_for(
        self, is_ready: Callable[[http.client.HTTPConnection], bool], poll_s: float = 0.05
    ) -> None:
        """Ask on a fresh connection until ``is_ready`` says yes."""
        limit = time.monotonic() + START_LIMIT_S
        while time.monotonic() < limit:
            self.see_alive()
            connection = self.connect()
            try:
                if is_ready(connection):
                    return
            except (ConnectionError, http.client.HTTPException):
                time.sleep(poll_s)  # nothing listens yet
            else:
                time.sleep(poll_s)
            finally:
                connection.close()
        raise BenchmarkError(self.with_log(f"not ready within {START_LIMIT_S:g} s"))


@contextmanager
def serving(
    command: Sequence[str | Path], port: int, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a server in an empty folder of its own; end it, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="ogpu-benchmark-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as log_file:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**_own_environment(), **(environment or {})},
                start_new_session=True,
            )
        pidfd = os.pidfd_open(process.pid)
        try:
            yield Server(process, pidfd, port, log)
        finally:
            _end(process, pidfd)
            os.close(pidfd)


@contextmanager
def serving_source(source: str, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run a source on ogpu.service with one worker and nobody to call back."""
    port = free_port()
    settings = {
        "OGPU_HOST": HOST,
        "OGPU_PORT": str(port),
        "OGPU_WORKERS": "1",
        **(environment or {}),
    }
    with serving([sys.executable, SOURCES / source], port, settings) as server:
        yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def is_ready(connection: http.client.HTTPConnection) -> bool:
    """Ask ogpu.service whether a task would run now."""
    connection.request("GET", "/readyz")
    return connection.getresponse().status == 200


def get(connection: http.client.HTTPConnection, path: str) -> Any:
    connection.request("GET", path)
    return answer(connection)


def post(
    connection: http.client.HTTPConnection,
    path: str,
    body: object,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send a request; ``answer`` reads what comes back."""
    given = {"content-type": "application/json", **(headers or {})}
    connection.request("POST", path, json.dumps(body), given)


def answer(connection: http.client.HTTPConnection) -> Any:
    response = connection.getresponse()
    body = response.read()
    if not 200 <= response.status < 300:
        raise BenchmarkError(f"answered {response.status}: {body[:500]!r}")
    return json.loads(body)


def _own_environment() -> dict[str, str]:
    """Return this process's environment, less what would reach someone else, or slow a start.

    Without bytecode files this checkout would be compiled at every start, and installed peers not.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name not in {"CALLBACK_URL", "PYTHONDONTWRITEBYTECODE"}
        and not name.lower().endswith("_proxy")
    }


def _has_ended(pidfd: int, within_s: float) -> bool:
    """Say whether the process has ended, without waiting for it (in the sense of wait(2))."""
    return bool(select.select([pidfd], [], [], within_s)[0])


def _end(process: subprocess.Popen[bytes], pidfd: int) -> None:
    """Ask the process that was started here to end; kill what is left of all that it started.

    It leads its session, and is not waited for until the end: so long the number is its group's
    alone. Some peers put their workers into other groups, and leave them behind.
    """
    below = psutil.Process(process.pid).children(recursive=True)
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    _has_ended(pidfd, STOP_LIMIT_S)
    os.killpg(process.pid, signal.SIGKILL)
    for child in below:
        with suppress(psutil.NoSuchProcess):  # psutil compares start times before it kills
            child.kill()
    process.wait(STOP_LIMIT_S)
