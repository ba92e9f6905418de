"""Mosec: a web server in Rust, and workers that it starts and talks to through a socket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from ..candidate import Candidate
from ..harness import HOST, SOURCES, free_port, serving
from .peer import Peer

_VERSION = "0.9.8"
_MAX_BODY_BYTES = 64 * 2**20  # 10 MiB as it comes


class Mosec(Peer):
    name = "mosec"
    label = f"Mosec {_VERSION}"
    requirements = (f"mosec=={_VERSION}",)
    imports = "mosec, pydantic"
    environment = "mosec"
    start_method: ClassVar[str] = "spawn"  # as it comes
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
        command = [self.python(torch=torch), SOURCES / "serve_mosec.py", "--address", HOST]
        command += ["--port", str(port), "--log-level", "warning"]
        command += ["--max-request-size", str(_MAX_BODY_BYTES)]
        given = {
            **self.variables(handlers, workers, port, variables),
            "BENCHMARK_START_METHOD": self.start_method,
        }
        with serving([*map(str, command)], port, given) as server:
            yield Candidate(self.label, server, "/inference")


class MosecForked(Mosec):
    """Workers are forked from a process that has imported the handlers, and prepared them."""

    name = "mosec-fork"
    label = f"Mosec {_VERSION}, fork"
    start_method = "fork"
    cannot: ClassVar[Mapping[str, str]] = {
        **Mosec.cannot,
        **dict.fromkeys(("echo", "payload", "batching", "hung"), "as Mosec: a start is no task"),
    }
