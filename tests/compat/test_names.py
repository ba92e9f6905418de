"""What today's names do where a source calls them itself, compared with 0.2.3."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ogpu.service
from ogpu.service import handler, server
from support.sink import Sink


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def said() -> Iterator[list[str]]:
    records = Records()
    ogpu.service.logger.addHandler(records)
    yield records.said
    ogpu.service.logger.removeHandler(records)


def test_send_callback_posts_the_result(
    sink: Sink, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CALLBACK_URL", sink.url)
    server.send_callback("0xabc", {"text": "é", "n": None})
    (delivery,) = sink.deliveries
    assert (delivery.path, delivery.json) == ("/callback/0xabc", {"text": "é", "n": None})
    assert delivery.headers["content-type"] == "application/json"
    assert said == [f"INFO Callback sent to {sink.url}/0xabc"]


def test_send_callback_says_what_a_receiver_refuses(
    sink: Sink, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises nothing then; it does where nobody answers."""
    monkeypatch.setattr(server, "CALLBACK_URL", sink.url)
    sink.answers = [500]
    server.send_callback("a", {})
    assert said == ["ERROR Failed to send callback: 500 ok"]
    sink.close()
    with pytest.raises(OSError, match="refused"):
        server.send_callback("a", {})


def test_send_callback_sends_json_only(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CALLBACK_URL", sink.url)
    with pytest.raises(ValueError, match="not JSON compliant"):
        server.send_callback("a", {"loss": math.nan})
    with pytest.raises(TypeError, match="not JSON serializable"):
        server.send_callback("a", {"raw": b""})
    assert sink.deliveries == []


def test_send_callback_without_a_receiver_says_so(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CALLBACK_URL", None)
    server.send_callback("a", {})
    assert said == ["INFO No callback address configured, skipping callback for task: a"]


def test_lifespan_raises_what_the_init_function_raises(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> None:
        raise RuntimeError("no weights")

    async def live() -> None:
        async with server.lifespan(None):
            raise AssertionError("it must not get here")

    monkeypatch.setattr(handler, "_init_function", load)
    with pytest.raises(RuntimeError, match="no weights"):
        asyncio.run(live())
    assert said == [
        "INFO Executing init function: `load`",
        "ERROR Init function `load` failed: no weights",
    ]


def test_a_dot_env_file_is_read_when_the_service_is_imported(tmp_path: Path) -> None:
    """The one of the folder first, then the one at home; the environment itself beats both."""
    folder, home = tmp_path / "folder", tmp_path / "home"
    for path, lines in ((folder, "A=folder\nB=folder\n"), (home, "A=home\nB=home\nC=home\n")):
        path.mkdir()
        (path / ".env").write_text(f"{lines}CALLBACK_URL=http://{path.name}\n")
    code = (
        "import os, ogpu.service.config as config; "
        "print(*map(os.environ.get, 'ABC'), config.CALLBACK_URL)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in {"B", "C", "CALLBACK_URL"}}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**environment, "A": "environment", "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["environment", "folder", "home", "http://folder"]
