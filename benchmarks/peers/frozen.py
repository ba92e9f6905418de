"""The frozen thread-based module that this service replaces."""

from __future__ import annotations

import http.client
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import ClassVar

from ..candidate import Candidate
from ..harness import SOURCES, free_port, serving
from .peer import Peer

_VERSION = "0.2.3"
# The same web server and models as here, so that the difference is the module's own. What it
# sends callbacks with, and uvicorn's loop and parser, are what its own requirements bring.
_SAME = ("fastapi", "uvicorn")
_POLL_S = 0.002
_NO_ANSWER = "it answers before the handler has run, and has no other way to tell a result"


class Frozen(Peer):
    name = "ogpu-frozen"
    label = f"ogpu.service {_VERSION} (frozen)"
    requirements = (f"ogpu[service]=={_VERSION}", *(f"{name}=={version(name)}" for name in _SAME))
    imports = "ogpu.service"
    answers = False
    cannot: ClassVar[Mapping[str, str]] = {
        "echo": _NO_ANSWER,
        "payload": _NO_ANSWER,
        "memory": "its handlers are threads of one process: there are no two workers",
        "batching": "it has no batches",
    }

    @contextmanager
    def serve(
        self,
        handlers: str,
        workers: int = 1,
        variables: Mapping[str, str] | None = None,
        *,
        torch: bool = False,
    ) -> Iterator[Candidate]:
        """Start it; handlers run in up to 40 threads of one process, whatever ``workers`` says."""
        port = free_port()
        given = self.variables(handlers, workers, port, variables)
        command = [self.python(torch=torch), SOURCES / "serve_frozen.py"]
        with serving(command, port, given) as server:
            server.wait_for(_is_up, _POLL_S)
            yield Candidate(self.label, server, "/run/handle/", True, answers=False)


def _is_up(connection: http.client.HTTPConnection) -> bool:
    connection.request("GET", "/openapi.json")  # it has no readiness of its own
    return connection.getresponse().status == 200
