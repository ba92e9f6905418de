"""What goes to the database, and what comes back of it. Data, and no SQL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .rows import Row

# A body that is larger goes as it is; a smaller one travels as a JSON string with the others.
_INLINE_BODY_BYTES = 32 * 1024
# A body of that many bytes is in a file of its own (bodies.py has the figures).
FILED_BODY_BYTES = 256 * 1024

Body = tuple[int, bytes]


@dataclass(slots=True)
class Batch:
    """What one commit writes.

    ``pending``: tasks that have ended, and whose callback is due from their end on; ``settled``:
    tasks whose inputs are not needed any more.
    """

    tasks: list[Row] = field(default_factory=list)
    pending: list[Row] = field(default_factory=list)
    inputs: list[Body] = field(default_factory=list)
    results: list[Body] = field(default_factory=list)
    deliveries: list[Row] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Written:
    """How long a commit took, and why no new task should follow it (None: there is room)."""

    took_s: float
    trouble: str | None


@dataclass(frozen=True, slots=True)
class Kept:
    """How much of what is over the database holds."""

    tasks: int
    result_bytes: int


class Forgotten(NamedTuple):
    """A task that the database had, and has no more."""

    number: int
    function: str
    address: str
    result_bytes: int


def by_size(bodies: list[Body]) -> tuple[list[tuple[int, str]], list[Body], list[Body]]:
    """Tell the bodies that can travel as JSON strings, the large or odd ones, and those for files.

    Of the latter an empty string travels.
    """
    small, large, filed = [], [], []
    for number, body in bodies:
        if not 0 < len(body) < FILED_BODY_BYTES:  # (an empty one would look as if in a file)
            small.append((number, ""))
            filed.append((number, body))
            continue
        if len(body) <= _INLINE_BODY_BYTES and b"\0" not in body:
            try:
                small.append((number, body.decode()))
                continue
            except UnicodeDecodeError:
                pass  # a worker may send anything; as it is, it is kept
        large.append((number, body))
    return small, large, filed
