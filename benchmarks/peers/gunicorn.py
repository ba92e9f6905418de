"""gunicorn's dirty workers: handlers in processes of their own, behind an arbiter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from ..candidate import Candidate
from ..harness import HOST, SOURCES, free_port, serving
from .peer import Peer

_VERSION = "27.0.1"
_HUNG_ONLY = "it is here for the hung handler only"


class Gunicorn(Peer):
    """One web process of eight threads, and the dirty workers with one thread each."""

    name = "gunicorn"
    label = f"gunicorn {_VERSION}, dirty workers"
    requirements = (f"gunicorn=={_VERSION}",)
    imports = "gunicorn.dirty"
    cannot: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("echo", "payload", "delivery", "boot", "memory", "batching", "backlog"), _HUNG_ONLY
    )

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
        given = {
            "BENCHMARK_TIMEOUT_S": "30",
            **self.variables(handlers, workers, port, variables),
            "PYTHONPATH": str(SOURCES),  # the application is no program that has a folder
        }
        command = [str(self.python(torch=torch)), "-m", "gunicorn", "serve_gunicorn:application"]
        command += ["--bind", f"{HOST}:{port}", "--worker-class", "gthread", "--threads", "8"]
        command += ["--dirty-app", "serve_gunicorn:Handler", "--dirty-workers", str(workers)]
        # It takes whole seconds.
        command += ["--dirty-timeout", str(round(float(given["BENCHMARK_TIMEOUT_S"])))]
        command += ["--no-control-socket"]
        with serving(command, port, given) as server:
            yield Candidate(self.label, server, "/")
