"""A real server process, started from a source file, and its HTTP API."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from .waiting import wait_until

SOURCES = Path(__file__).parent.parent / "sources"
_LISTENING = re.compile(r"Listening on http://[\d.]+:(\d+)")
# What a developer may have set is not to reach the servers under test.
_OURS = ("OGPU_", "CALLBACK_URL", "SOURCE_ADDRESS", "PROVIDER_ADDRESS", "PYTHONUNBUFFERED")


class Server:
    """``python main.py`` and what it says; ``log`` is its stderr.

    With a ``prefix``, a command that runs it, ``process`` is that command.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        log_file: Path,
        settings: dict[str, str],
        prefix: Sequence[str] = (),
    ) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}
        environment |= {"OGPU_HOST": "127.0.0.1", "OGPU_PORT": "0", **settings}
        self._log_file = log_file
        with log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-X", "dev", "-W", "error", *command],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._client: httpx.Client | None = None

    # --- what it says

    @property
    def log(self) -> str:
        return self._log_file.read_text(encoding="utf-8", errors="backslashreplace")

    @property
    def url(self) -> str:
        match = _LISTENING.search(self.log)
        assert match, f"not listening:\n{self.log}"
        return f"http://127.0.0.1:{match[1]}"

    @property
    def http(self) -> httpx.Client:
        if self._client is None:
            self._client = httpx.Client(base_url=self.url, timeout=30)
        return self._client

    # --- waiting

    def wait_ready(self, timeout_s: float = 20) -> Server:
        self.wait_listening(timeout_s)
        wait_until(lambda: self.http.get("/readyz").status_code == 200, "ready", timeout_s)
        return self

    def wait_listening(self, timeout_s: float = 20) -> Server:
        def listening() -> bool:
            assert self.process.poll() is None, f"it ended while starting:\n{self.log}"
            return bool(_LISTENING.search(self.log))

        wait_until(listening, "listening", timeout_s)
        return self

    def wait_log(self, text: str, timeout_s: float = 15) -> None:
        wait_until(lambda: text in self.log, f"{text!r} in the log", timeout_s)

    def wait_exit(self, timeout_s: float = 20) -> int:
        return self.process.wait(timeout_s)

    # --- calls

    def run(
        self, function: str, address: str, body: object = None, wait_s: int = 30
    ) -> dict[str, Any]:
        """Run a task to its end and return it."""
        response = self.http.post(
            f"/run/{function}/{address}",
            json={} if body is None else body,
            headers={"Prefer": f"wait={wait_s}"},
        )
        assert response.status_code == 200, (response.status_code, response.text, self.log)
        task: dict[str, Any] = response.json()
        return task

    def post(self, function: str, address: str, body: object = None) -> httpx.Response:
        return self.http.post(f"/run/{function}/{address}", json={} if body is None else body)

    def task(self, address: str) -> dict[str, Any]:
        response = self.http.get(f"/tasks/{address}")
        assert response.status_code == 200, response.text
        task: dict[str, Any] = response.json()
        return task

    def wait_state(self, address: str, state: str, timeout_s: float = 15) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            response = self.http.get(f"/tasks/{address}")
            task: dict[str, Any] = response.json()
            return task if response.status_code == 200 and task["state"] == state else None

        found = wait_until(reached, f"{address} is {state}", timeout_s)
        assert found is not None
        return found

    def workers(self) -> dict[str, Any]:
        pool: dict[str, Any] = self.http.get("/workers").json()
        return pool

    def slot(self, index: int = 0) -> dict[str, Any]:
        slot: dict[str, Any] = self.workers()["workers"][index]
        return slot

    # --- the end

    def stop(self, timeout_s: float = 20) -> int:
        """Ask it to drain (SIGTERM) and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait_exit(timeout_s)

    def close(self) -> None:
        """End it whatever it does, and give everything back."""
        if self._client is not None:
            self._client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
