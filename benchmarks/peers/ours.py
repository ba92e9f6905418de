"""This service, from this checkout, in the running interpreter."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from ..candidate import Candidate
from ..environments import InstallError
from ..harness import HOST, SOURCES, free_port, serving
from .peer import Peer

_PACKAGE = Path(__file__).parents[2] / "src"


class Ours(Peer):
    """One worker or more, the journal on disk, a task address of its own for each request."""

    name = "ogpu-service"
    label = "ogpu-service"
    state_dir: ClassVar[str] = "ogpu-state"

    def prepare(self, cache: Path, *, torch: bool = False) -> None:
        del cache  # it is here
        if torch and importlib.util.find_spec("torch") is None:
            raise InstallError("torch is not installed in the interpreter that runs this")
        self._pythons[torch] = Path(sys.executable)

    def packages(self) -> dict[str, list[str]]:
        return {}  # the versions of the running interpreter are told anyway

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
        settings = {
            "BENCHMARK_HANDLERS": handlers,
            "PYTHONPATH": str(_PACKAGE),  # whatever is installed
            "OGPU_HOST": HOST,
            "OGPU_PORT": str(port),
            "OGPU_WORKERS": str(workers),
            "OGPU_STATE_DIR": self.state_dir,
            **(variables or {}),
        }
        function = "handle_many" if "BENCHMARK_BATCH_SIZE" in settings else "handle"
        with serving([self.python(torch=torch), SOURCES / "serve_ogpu.py"], port, settings) as it:
            yield Candidate(self.label, it, f"/run/{function}/", True, "wait=30", found_in="result")


class OursInMemory(Ours):
    """The same with nothing on disk: what durability costs."""

    name = "ogpu-memory"
    label = "ogpu-service, :memory:"
    state_dir = ":memory:"
    cannot: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("hung", "boot", "memory", "batching"), "the journal makes no difference there"
    )
