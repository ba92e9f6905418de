"""Fronts that follow one another on one folder."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from .crash_load import read_ledger
from .server import Server

StartServer = Callable[..., Server]


class Fronts:
    """Fronts on one folder, one after the other, with the ledger source or another one."""

    def __init__(self, start_server: StartServer, tmp_path: Path, **settings: object) -> None:
        self.ledger = tmp_path / "ledger"
        self.ledger.touch()
        self.state_dir = tmp_path / "state"
        self._start_server = start_server
        self._settings = {
            "OGPU_STATE_DIR": self.state_dir, "LEDGER": self.ledger, "OGPU_WORKERS": 2,
            "OGPU_MAX_ATTEMPTS": 100, "OGPU_QUEUE_SIZE": 150, **settings,
        }  # fmt: skip

    def start(self, source: str = "ledger.py", *, wait: bool = True, **settings: object) -> Server:
        return self._start_server(source, wait=wait, **(self._settings | settings))

    def runs(self) -> dict[str, list[int]]:
        """Return the attempts of each address."""
        return {
            address: [attempt for attempt, _ in runs]
            for address, runs in read_ledger(self.ledger).items()
        }

    def rows(self, columns: str, table: str = "tasks") -> list[Any]:
        """Read the journal, which no front has open now."""
        with closing(sqlite3.connect(self.state_dir / "journal.db")) as journal:
            return journal.execute(f"SELECT {columns} FROM {table} ORDER BY number").fetchall()


def pause(seconds: float) -> None:
    """Let a random moment come. Nothing is waited for here: the moment is what is tested."""
    time.sleep(seconds)


def crash(server: Server) -> None:
    server.process.kill()
    assert server.wait_exit() == -signal.SIGKILL, server.log
