"""Whether what was aimed at was reached: medians of ratios, ours to another's, against a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from .peers.ours import Ours
from .peers.peer import Peer
from .rounds import ratios


def at_least(
    what: str,
    values: Mapping[str, Sequence[float]],
    peers: Sequence[Peer],
    bounds: Mapping[str, float],
) -> list[str]:
    """Say for each peer whether ours is so many times as much as its own, at least.

    Args:
        what: the figure, for people.
        values: label → a value for each round.
        peers: those that were asked for.
        bounds: name of a peer → the ratio that is aimed at.
    """
    return _verdicts(what, "at least", values, peers, bounds)


def at_most(
    what: str,
    values: Mapping[str, Sequence[float]],
    peers: Sequence[Peer],
    bounds: Mapping[str, float],
) -> list[str]:
    """Say the same of a figure of which less is better."""
    return _verdicts(what, "at most", values, peers, bounds)


def for_each(peers: Sequence[Peer], bound: float) -> dict[str, float]:
    """Return the same bound for every peer that is not this service."""
    return {peer.name: bound for peer in peers if not isinstance(peer, Ours)}


def _verdicts(
    what: str,
    relation: str,
    values: Mapping[str, Sequence[float]],
    peers: Sequence[Peer],
    bounds: Mapping[str, float],
) -> list[str]:
    notes = []
    for peer in peers:
        bound, found = bounds.get(peer.name), ratios(values, peer.label)
        if bound is None or not found:
            continue
        ratio = median(found)
        reached = ratio >= bound if relation == "at least" else ratio <= bound
        outcome = "reached" if reached else "**not reached**"
        notes.append(
            f"Goal: {what} {relation} {bound:g} times that of {peer.label}: {outcome} ({ratio:.2f})"
        )
    return notes
