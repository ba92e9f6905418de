"""This service, from this checkout, in the running interpreter; with torch in one of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import ClassVar

from ..candidate import Candidate
from ..environments import InstallError, packages, peer_python
from ..harness import HOST, SOURCES, free_port, serving
from .peer import TORCH, Peer

_PACKAGE = Path(__file__).parents[2] / "src"


class Ours(Peer):
    """One worker or more, the journal on disk, a task address of its own for each request."""

    name = "ogpu-service"
    label = "ogpu-service"
    state_dir: ClassVar[str] = "ogpu-state"

    def prepare(self, cache: Path, *, torch: bool = False) -> None:
        if not torch:
            self._pythons[torch] = Path(sys.executable)
            return
        # As the peers': an import of torch imports NumPy as well, where it is. The environment of
        # the tests has it, and Mosec's and pebble's have not: 2 % of a start, and of the memory.
        pins = (*_pinned_requirements(), TORCH)
        self._pythons[torch] = peer_python(cache, self.name, pins, "fastapi, uvloop, torch")

    def packages(self) -> dict[str, list[str]]:
        """Return what is in the environment with torch; the running one's is told anyway."""
        python = self._pythons.get(True)
        return {} if python is None else {python.parents[1].name: packages(python)}

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


def _pinned_requirements() -> list[str]:
    """Return what this package requires, in the versions of the running interpreter."""
    try:
        needed = [text for text in requires("ogpu-service") or () if "extra ==" not in text]
        names = [re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in needed]
        return [f"{name}=={version(name)}" for name in names]
    except PackageNotFoundError as error:
        raise InstallError(f"{error} is not installed in the running interpreter") from error


class OursInMemory(Ours):
    """The same with nothing on disk: what durability costs."""

    name = "ogpu-memory"
    label = "ogpu-service, :memory:"
    state_dir = ":memory:"
    cannot: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("hung", "boot", "memory", "batching"), "the journal makes no difference there"
    )
