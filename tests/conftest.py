"""Fixtures: a server, a receiver, and the check that a test leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.processes import adopt_orphans, descendants
from support.server import SOURCES, Server
from support.sink import Sink
from support.waiting import wait_until

StartServer = Callable[..., Server]


def pytest_configure() -> None:
    adopt_orphans()


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """After each test no process that it started is left, nor any that those started."""
    yield
    try:
        wait_until(lambda: not descendants(), "no process left over", timeout_s=5)
    except AssertionError:
        left = descendants()
        names = [(p.pid, " ".join(p.cmdline())[:120]) for p in left]
        for process in left:
            process.kill()
        pytest.fail(f"left over: {names}")


@pytest.fixture
def start_server(tmp_path: Path, nothing_left_over: None) -> Iterator[StartServer]:
    """Start servers from source text, a file of tests/sources, or a command; stop them after."""
    servers: list[Server] = []

    def start(
        source: str = "zoo.py",
        *,
        command: list[str] | None = None,
        folder: Path | None = None,
        prefix: list[str] | None = None,
        wait: bool = True,
        **settings: object,
    ) -> Server:
        if command is None:
            path = SOURCES / source
            if "\n" in source:
                path = tmp_path / f"source{len(servers)}.py"
                path.write_text(source, encoding="utf-8")
            command = [str(path)]
        settings.setdefault("OGPU_STATE_DIR", tmp_path / f"state{len(servers)}")
        environment = {name: str(value) for name, value in settings.items()}
        log_file = tmp_path / f"server{len(servers)}.log"
        server = Server(command, folder or tmp_path, log_file, environment, prefix or [])
        servers.append(server)
        return server.wait_ready() if wait else server

    yield start
    for server in servers:
        server.close()
    for server in servers:
        # A defect that the service caught and logged is a failure of the test that caused it.
        for complaint in (
            "background task of the pool failed",
            "Exception in callback",
            "never retrieved",
        ):
            assert complaint not in server.log, server.log


@pytest.fixture
def sink() -> Iterator[Sink]:
    """A callback receiver."""
    receiver = Sink()
    yield receiver
    receiver.close()
