"""FastAPI with the handler inline: no second process, no task, no deadline.

uvicorn with uvloop and httptools and no access log. The versions are the ones that this service
runs on here, so that the difference is not theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import ClassVar

from ..candidate import Candidate
from ..harness import SOURCES, free_port, serving
from .peer import Peer

_SAME = ("fastapi", "uvicorn", "uvloop", "httptools")


class FastAPIInline(Peer):
    name = "fastapi"
    label = f"FastAPI {version('fastapi')} inline"
    requirements = tuple(f"{name}=={version(name)}" for name in _SAME)
    imports = "fastapi, uvicorn, uvloop, httptools"
    cannot: ClassVar[Mapping[str, str]] = {
        "delivery": "it calls nobody back",
        "backlog": "it has no queue: a request waits with its connection",
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
        port = free_port()
        given = self.variables(handlers, workers, port, variables)
        command = [self.python(torch=torch), SOURCES / "serve_fastapi.py"]
        with serving(command, port, given) as server:
            yield Candidate(self.label, server, "/handle")
