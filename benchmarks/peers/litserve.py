"""LitServe: FastAPI in front, workers that it starts and talks to through a queue.

One web process per worker, as it comes; the fast queue (ZeroMQ), which it documents for high loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from ..candidate import Candidate
from ..harness import SOURCES, free_port, serving
from .peer import Peer

_VERSION = "0.2.19"


class LitServe(Peer):
    name = "litserve"
    label = f"LitServe {_VERSION}"
    # The extra is what its fast queue needs.
    requirements = (f"litserve=={_VERSION}", "pyzmq==27.1.0")
    imports = "litserve, zmq"
    cannot: ClassVar[Mapping[str, str]] = {
        "delivery": "it calls nobody back",
        "backlog": "it has no queue that outlives a request",
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
        port = free_port()
        given = self.variables(handlers, workers, port, variables)
        command = [self.python(torch=torch), SOURCES / "serve_litserve.py"]
        with serving(command, port, given) as server:
            yield Candidate(self.label, server, "/predict")
