"""Turns of several candidates, interleaved, and ratios within a round.

A machine drifts by a third within minutes, so only neighbours in time are compared. The order is
turned around in every other round (a b c, c b a, …): what drifts in one direction hits all alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .harness import BenchmarkError
from .report import spread

OURS = "ogpu-service"
NO_RATIO = "-"
Figure = TypeVar("Figure")


@dataclass
class Rounds(Generic[Figure]):
    """What each candidate's turns gave, and why others have none."""

    figures: dict[str, list[Figure]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def values(self, value: Callable[[Figure], float]) -> dict[str, list[float]]:
        return {name: [value(one) for one in many] for name, many in self.figures.items()}

    def drop(self, name: str, error: BenchmarkError) -> None:
        """Leave a candidate without figures: one turn of it went wrong."""
        self.figures.pop(name, None)
        self.notes.append(f"{name}: no figures, {first_line(error)}")
        print(f"{name}: no figures, {error}", file=sys.stderr)


def measure(
    candidates: Mapping[str, Callable[[int], Figure]],
    rounds: int,
    tell: Callable[[Figure], str],
) -> Rounds[Figure]:
    """Let every candidate have its turn in every round.

    Args:
        candidates: name → a turn; it is given the number of the round, from 1, and raises
            ``BenchmarkError`` where there is no figure.
        rounds: how many.
        tell: puts a figure into words, for who waits.
    """
    done: Rounds[Figure] = Rounds({name: [] for name in candidates})
    for number, name in turns(list(candidates), rounds):
        if name not in done.figures:
            continue
        try:
            figure = candidates[name](number)
        except BenchmarkError as error:
            done.drop(name, error)
        else:
            done.figures[name].append(figure)
            print(f"round {number}, {name}: {tell(figure)}", file=sys.stderr)
    return done


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield the round's number and whose turn it is."""
    for number in range(1, rounds + 1):
        for name in names if number % 2 else reversed(names):
            yield number, name


def ratios(values: Mapping[str, Sequence[float]], name: str, ours: str = OURS) -> list[float]:
    """Return ours over another's, round by round; nothing where one of them has no figures."""
    if ours not in values or name not in values:
        return []
    return [one / other for one, other in zip(values[ours], values[name], strict=True)]


def ratio_cell(values: Mapping[str, Sequence[float]], name: str, ours: str = OURS) -> str:
    found = ratios(values, name, ours)
    if not found:
        return NO_RATIO
    return "1" if name == ours else spread(found, ".2f")


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
