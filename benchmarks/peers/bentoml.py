"""BentoML: one web process per worker, with the handler in it.

It has uvloop and httptools, which it takes where they are installed, and neither access log nor
metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from ..candidate import Candidate
from ..harness import HOST, SOURCES, free_port, serving
from .peer import Peer

_VERSION = "1.4.40"


class BentoML(Peer):
    name = "bentoml"
    label = f"BentoML {_VERSION}"
    requirements = (
        f"bentoml=={_VERSION}",
        *(f"{name}=={version(name)}" for name in ("uvloop", "httptools")),
    )
    imports = "bentoml, uvloop, httptools"
    cannot: ClassVar[Mapping[str, str]] = {
        "delivery": "it calls nobody back",
        "backlog": "its tasks need a store of its makers' cloud, or wait in the process's memory",
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
        command: list[str | Path] = [
            self.python(torch=torch),
            "-m",
            "bentoml",
            "serve",
            "serve_bentoml:Service",
        ]
        command += ["--working-dir", str(SOURCES), "--host", HOST, "--port", str(port), "--quiet"]
        given = {
            **self.variables(handlers, workers, port, variables),
            "BENTOML_DO_NOT_TRACK": "True",
        }
        with serving(command, port, given) as server:
            # Batched, each request is a list of inputs, of which BentoML makes one with others.
            yield Candidate(self.label, server, "/handle", listed="BENCHMARK_BATCH_SIZE" in given)
