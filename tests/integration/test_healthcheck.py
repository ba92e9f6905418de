"""``python -m ogpu.service healthcheck``, run as a container engine runs it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from conftest import StartServer


def healthcheck(*options: str, **environment: object) -> tuple[int, str]:
    """Run it; return the exit code and the line that it said."""
    settings = {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "ogpu.service", "healthcheck", *options],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert not done.stderr, done.stderr
    (line,) = done.stdout.splitlines()
    return done.returncode, line


@contextmanager
def listener(answer: bytes | None) -> Iterator[int]:
    """Yield the port of a server that gives everyone this answer; None: that says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(65536)
                if answer is not None:
                    client.sendall(answer)
                else:
                    client.recv(1)  # until the other one has had enough

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join(10)
        assert not thread.is_alive()


def test_a_service_that_loads_or_drains_is_alive(start_server: StartServer, tmp_path: Path) -> None:
    """Liveness is the default and needs no key; readiness is asked for, and says why not."""
    loaded = tmp_path / "loaded"
    server = start_server(
        wait=False, OGPU_API_KEY="key", OGPU_BIND="early", ZOO_INIT_WAITS_FOR=loaded
    ).wait_listening()
    port = server.url.rpartition(":")[2]
    assert healthcheck(OGPU_PORT=port, OGPU_HOST="0.0.0.0")[0] == 0
    code, line = healthcheck("--ready", OGPU_PORT=port)
    assert (code, "/readyz answered 503: No worker has run @init yet" in line) == (1, True)
    loaded.touch()
    server.wait_ready()
    code, line = healthcheck("--ready", OGPU_PORT=port, OGPU_HOST="")
    assert (code, line.partition(" in ")[0]) == (0, f"http://127.0.0.1:{port}/readyz answered 200")
    server.http.post("/drain", headers={"authorization": "Bearer key"})
    assert healthcheck("--url", server.url + "/")[0] == 0
    code, line = healthcheck("--url", server.url, "--ready")
    assert (code, "/readyz answered 503: The service is draining" in line) == (1, True)


def test_a_proxy_is_not_asked(start_server: StartServer) -> None:
    """http_proxy is for the way out, and often set for a whole container."""
    server = start_server()
    nobody = "http://127.0.0.1:9"
    proxies = {"http_proxy": nobody, "HTTP_PROXY": nobody, "all_proxy": nobody, "no_proxy": ""}
    assert healthcheck("--url", server.url, **proxies)[0] == 0


def test_a_closed_port_is_not_healthy() -> None:
    """As while the first model is loaded."""
    with closing(socket.socket()) as reserved:
        reserved.bind(("127.0.0.1", 0))  # and nobody listens
        code, line = healthcheck(OGPU_PORT=reserved.getsockname()[1])
    assert code == 1
    assert line.endswith("Connection refused")


def test_who_does_not_answer_in_time_is_not_healthy() -> None:
    with listener(None) as port:
        code, line = healthcheck("--timeout", "0.2", OGPU_PORT=port)
    assert code == 1
    assert line == f"no answer from http://127.0.0.1:{port}/healthz: timed out"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no answer from"),
        (b"", "no answer from"),
        (b"HTTP/1.1 500 Oh dear\r\ncontent-length: 0\r\n\r\n", "answered 500: Oh dear"),
        (b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\n[{}]", "answered 503: Busy"),
    ],
)
def test_who_answers_something_else_is_not_healthy(answer: bytes, words: str) -> None:
    """One line of words, whatever listens on that port."""
    with listener(answer) as port:
        code, line = healthcheck(OGPU_PORT=port)
    assert code == 1
    assert words in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"OGPU_HOST": "::", "OGPU_PORT": 1}, "http://[::1]:1/healthz"),
        ({"OGPU_HOST": "127.0.0.2", "OGPU_PORT": 1}, "http://127.0.0.2:1/healthz"),
        ({"OGPU_PORT": 0}, "OGPU_PORT=0 is any free port"),
        ({"OGPU_PORT": "many"}, "OGPU_PORT='many'"),
    ],
)
def test_it_asks_where_the_service_listens(settings: dict[str, object], words: str) -> None:
    code, line = healthcheck(**settings)
    assert code == 1
    assert words in line


def test_a_timeout_that_is_none_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ogpu.service", "healthcheck", "--timeout", "0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "'0' is not a number of seconds" in run.stderr


def test_it_is_quick() -> None:
    """An engine asks every few seconds: nothing of the web server is imported for it."""
    code = (
        "import sys; from ogpu.service.cli import main; main(['healthcheck']); "
        "print({'fastapi', 'uvicorn', 'httptools', 'uvloop', 'sqlite3'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[1] == "set()"
