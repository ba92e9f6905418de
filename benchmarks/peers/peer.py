"""What a peer is: installed, started, asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from ..candidate import Candidate
from ..environments import packages, peer_python

TORCH = "torch==2.13.0"  # where the machine has a build for CPUs, pip should be told to take it


class Peer(ABC):
    """One file each. ``prepare`` it, then ``serve``.

    Attributes:
        name: what --peers calls it.
        label: what tables call it, with its version.
        requirements: what its environment has, beside the pydantic of this one; pinned.
        imports: what must be importable then, as ``import`` takes it.
        environment: what its folder is called where two peers are the same package.
        answers: whether an answer has the output; False where results only go to CALLBACK_URL.
        cannot: case → why it cannot do it, in words that follow "left out, ".
        most_workers: how many processes can run the handler; None = as many as are wanted.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    requirements: ClassVar[tuple[str, ...]] = ()
    imports: ClassVar[str] = ""
    environment: ClassVar[str] = ""
    answers: ClassVar[bool] = True
    cannot: ClassVar[Mapping[str, str]] = {}
    most_workers: ClassVar[int | None] = None

    def __init__(self) -> None:
        self._pythons: dict[bool, Path] = {}

    def prepare(self, cache: Path, *, torch: bool = False) -> None:
        """Make its environment, where it is not yet; one of its own with torch.

        Raises:
            InstallError: it cannot be had here.
        """
        pins = (*self.requirements, f"pydantic=={version('pydantic')}", *([TORCH] * torch))
        self._pythons[torch] = peer_python(
            cache, self.environment or self.name, pins, f"{self.imports}{', torch' * torch}"
        )

    def python(self, *, torch: bool = False) -> Path:
        """Return the interpreter that ``prepare`` has seen to."""
        return self._pythons[torch]

    def packages(self) -> dict[str, list[str]]:
        """Return what is in each environment that was used, by the environment's folder."""
        return {python.parents[1].name: packages(python) for python in set(self._pythons.values())}

    def variables(
        self, handlers: str, workers: int, port: int, others: Mapping[str, str] | None
    ) -> dict[str, str]:
        """Return what the programs in sources/ read from their environment."""
        return {
            "BENCHMARK_HANDLERS": handlers,
            "BENCHMARK_WORKERS": str(workers),
            "BENCHMARK_PORT": str(port),
            "PYTHONPATH": "",  # this checkout's way to its own package
            **(others or {}),
        }

    @abstractmethod
    def serve(
        self,
        handlers: str,
        workers: int = 1,
        variables: Mapping[str, str] | None = None,
        *,
        torch: bool = False,
    ) -> AbstractContextManager[Candidate]:
        """Start it with the handler of ``sources/handlers/{handlers}.py``.

        The server may not listen yet when the context is entered: ask until it answers. It ends
        with the context.

        Args:
            handlers: the module's name.
            workers: processes that run the handler.
            variables: environment variables beside this process's.
            torch: with the interpreter that has torch.
        """
