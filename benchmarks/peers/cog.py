"""Cog: a web server in Rust, and one process that predicts; without the container around it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from ..candidate import Candidate
from ..harness import HOST, SOURCES, free_port, serving
from .peer import Peer

_VERSION = "0.23.1"
# It refuses (409) what comes while all are taken, and one is taken until after the answer was sent:
# as many as a load has connections are too few. Only quick handlers can have them (serve_cog.py).
_CONCURRENCY = 64
_QUICK = ("echo",)


class Cog(Peer):
    name = "cog"
    label = f"Cog {_VERSION}"
    requirements = (f"cog=={_VERSION}",)
    imports = "cog, coglet"
    most_workers = 1
    cannot: ClassVar[Mapping[str, str]] = {
        "delivery": "its webhooks tell a prediction's whole record, which is another task",
        "backlog": "it has no queue: it refuses what comes while it is busy",
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
        port, python = free_port(), self.python(torch=torch)
        given = {
            **self.variables(handlers, workers, port, variables),
            "PORT": str(port),
            "COG_PREDICT_TYPE_STUB": f"{SOURCES / 'serve_cog.py'}:Runner",
            "COG_MAX_CONCURRENCY": str(_CONCURRENCY if handlers in _QUICK else 1),
            "COG_LOG_LEVEL": "warning",
            "PATH": f"{python.parent}:{os.environ['PATH']}",  # it starts `python` to predict with
            "PYTHONPATH": str(SOURCES),  # the runner is no program that has a folder
        }
        with serving([python, "-m", "cog.server.http", "--host", HOST], port, given) as server:
            yield Candidate(
                self.label, server, "/predictions", wrapped_in="input", found_in="output"
            )
