"""Celery with a hard time limit: the prefork pool, and Redis as broker and for results."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from ..candidate import Candidate
from ..environments import InstallError
from ..harness import SOURCES, free_port, serving
from ..lines import LineCandidate
from .peer import Peer

_VERSION = "5.7.0"
_REDIS_CLIENT = "8.1.0"
_HUNG_ONLY = "it is here for the hung handler only"


class Celery(Peer):
    name = "celery"
    label = f"Celery {_VERSION}, time limit"
    requirements = (f"celery[redis]=={_VERSION}", f"redis=={_REDIS_CLIENT}", "packaging==26.3")
    imports = "celery, redis"
    cannot: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("echo", "payload", "delivery", "boot", "memory", "batching", "backlog"), _HUNG_ONLY
    )

    def prepare(self, cache: Path, *, torch: bool = False) -> None:
        if shutil.which("redis-server") is None:
            raise InstallError("redis-server is not installed: apt-get install redis-server")
        super().prepare(cache, torch=torch)

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
            **self.variables(handlers, workers, port, variables),
            "PYTHONPATH": str(SOURCES),  # its worker is no program that has a folder
        }
        command = [self.python(torch=torch), SOURCES / "serve_celery.py"]
        with serving(command, port, given) as server:
            yield LineCandidate(self.label, server, "")
