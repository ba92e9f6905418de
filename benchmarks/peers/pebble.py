"""pebble: a pool of processes with a timeout for each task, called without a web server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from ..candidate import Candidate
from ..harness import SOURCES, free_port, serving
from ..lines import LineCandidate
from .peer import Peer

_VERSION = "5.2.3"
_NO_SERVER = "it is a pool without a server"


class Pebble(Peer):
    """As it comes: each worker imports the handlers itself."""

    name = "pebble"
    environment = "pebble"
    label = f"pebble {_VERSION}, no HTTP"
    requirements = (f"pebble=={_VERSION}",)
    imports = "pebble"
    is_tuned: ClassVar[bool] = False
    cannot: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("echo", "payload", "delivery", "backlog"), _NO_SERVER),
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
        given = {
            **self.variables(handlers, workers, port, variables),
            "BENCHMARK_TUNED": str(int(self.is_tuned)),
        }
        command = [self.python(torch=torch), SOURCES / "serve_pebble.py"]
        with serving(command, port, given) as server:
            yield LineCandidate(self.label, server, "")


class PebbleTuned(Pebble):
    """Handlers imported before the first fork, and clocks as short as they can be."""

    name = "pebble-tuned"
    label = f"pebble {_VERSION}, pre-forked, tuned, no HTTP"
    is_tuned = True
