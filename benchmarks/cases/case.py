"""What a case is given, and what it gives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..environments import InstallError
from ..harness import BenchmarkError
from ..peers.peer import Peer
from ..rounds import first_line

Started = TypeVar("Started")


@dataclass(frozen=True)
class Options:
    """How long to look, and where environments are kept."""

    rounds: int
    seconds: int
    cache: Path


@dataclass(frozen=True)
class Table:
    """One table of markdown, and the sentence above it."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Result:
    """What a case has found.

    Attributes:
        tables: for people.
        notes: a line each: who was left out, and why; what else a reader must know.
        figures: every single figure, for JSON.
    """

    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One question to all peers; ``run`` raises BenchmarkError where nobody can be asked."""

    name: str
    title: str
    run: Callable[[Sequence[Peer], Options], Result]


def able(
    peers: Sequence[Peer],
    case: str,
    options: Options,
    notes: list[str],
    *,
    workers: int = 1,
    torch: bool = False,
) -> list[Peer]:
    """Return the peers that can do the case, installed; a note says why each other cannot."""
    found = []
    for peer in peers:
        reason = peer.cannot.get(case)
        try:
            if peer.most_workers is not None and workers > peer.most_workers:
                reason = reason or f"it has {peer.most_workers} worker at most, not {workers}"
            if reason is None:
                peer.prepare(options.cache, torch=torch)
        except InstallError as error:
            reason = f"cannot be installed here ({error})"
        if reason is None:
            found.append(peer)
        elif (note := f"{peer.label}: left out, {reason}") not in notes:
            notes.append(note)
            print(note, file=sys.stderr)
    return found


def started(
    stack: ExitStack,
    peers: Sequence[Peer],
    notes: list[str],
    start: Callable[[ExitStack, Peer], Started],
    when: str = "",
) -> Iterator[tuple[Peer, Started]]:
    """Yield each peer with what ``start`` gives; a note says why, and when, one did not start."""
    for peer in peers:
        with ExitStack() as own:  # what a failed start has entered ends here
            try:
                thing = start(own, peer)
            except BenchmarkError as error:
                notes.append(f"{when}{peer.label}: no figures, {first_line(error)}")
                print(f"{peer.label}: no figures, {error}", file=sys.stderr)
                continue
            stack.push(own.pop_all())
        yield peer, thing


def twice(start: Callable[[], Started]) -> Started:
    """Start a server, and once more where that fails.

    BentoML looks for free ports of its own and binds them later; in between, a connection of who
    asks whether it is ready may have got one.
    """
    try:
        return start()
    except BenchmarkError as error:
        print(f"once more: {first_line(error)}", file=sys.stderr)
        return start()
