"""Requests/s and latency of a handler that answers the text that it was sent.

1. For one worker, and then for two: every peer's server is started, and asked until it answers.
2. One at a time is under the load of wrk, 32 connections and then one, while the others idle.
3. One answer that is not 2xx, or one error of a connection, and the peer has no figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from .. import report
from ..candidate import Candidate
from ..goals import at_least, at_most, for_each
from ..harness import BenchmarkError
from ..load.wrk import Load, is_installed, load
from ..peers.peer import Peer
from ..rounds import Rounds, measure, ratio_cell, ratios
from .case import Case, Options, Result, Table, able, started

_NAME = "echo"
_BODY = {"text": "hello world"}
_WORKERS = (1, 2)
_CONCURRENCY = 32
_WARM_UP_S = 1
_LEAST = {"ogpu-memory": 0.75, "fastapi": 1.5, "mosec": 2, "litserve": 12}


@dataclass(frozen=True)
class Turn:
    """Full load, then one request at a time."""

    full: Load
    alone: Load


def _run(peers: Sequence[Peer], options: Options) -> Result:
    if not is_installed():
        raise BenchmarkError("wrk is not installed (apt-get install wrk)")
    result = Result()
    for workers in _WORKERS:
        chosen = able(peers, _NAME, options, result.notes, workers=workers)
        rounds = _measure(chosen, workers, options, result.notes)
        result.tables.append(_table(rounds, workers))
        result.figures[_with(workers)] = _figures(rounds)
        result.notes += _goals(rounds, peers, workers)
    return result


def _measure(
    peers: Sequence[Peer], workers: int, options: Options, notes: list[str]
) -> Rounds[Turn]:
    def start(stack: ExitStack, peer: Peer) -> Candidate:
        candidate = stack.enter_context(peer.serve("echo", workers))
        candidate.wait_until_answered(_BODY, _BODY)
        load(candidate, _BODY, "warm-up", _CONCURRENCY, _WARM_UP_S)
        return candidate

    with ExitStack() as stack:
        turns = {
            peer.label: _turn(candidate, options.seconds)
            for peer, candidate in started(stack, peers, notes, start, f"{_with(workers)}: ")
        }
        rounds = measure(turns, options.rounds, _tell)
    notes += [f"{_with(workers)}: {note}" for note in rounds.notes]
    return rounds


def _turn(candidate: Candidate, seconds: int) -> Callable[[int], Turn]:
    return lambda number: Turn(
        load(candidate, _BODY, f"{number}-full", _CONCURRENCY, seconds),
        load(candidate, _BODY, f"{number}-alone", 1, seconds),
    )


def _with(workers: int) -> str:
    return f"{workers} worker{'s' * (workers > 1)}"


def _goals(rounds: Rounds[Turn], peers: Sequence[Peer], workers: int) -> list[str]:
    rates = rounds.values(lambda turn: turn.full.requests_per_s)
    if workers > 1:
        return at_least(f"requests/s with {_with(workers)}", rates, peers, {"mosec": 1})
    latencies = rounds.values(lambda turn: turn.alone.p50_us)
    return [
        *at_least("requests/s", rates, peers, _LEAST),
        *at_most("p50 alone", latencies, peers, for_each(peers, 1)),
    ]


def _tell(turn: Turn) -> str:
    return (
        f"{turn.full.requests_per_s:.0f} requests/s; alone {turn.alone.p50_us:.0f} µs; "
        f"others used {turn.full.others_cpus:.2f} and {turn.alone.others_cpus:.2f} CPUs"
    )


def _table(rounds: Rounds[Turn], workers: int) -> Table:
    rates = rounds.values(lambda turn: turn.full.requests_per_s)
    latencies = rounds.values(lambda turn: turn.alone.p50_us)
    rows = [
        [
            name,
            report.spread(rates[name], ".0f"),
            ratio_cell(rates, name),
            f"{statistics.median(turn.full.p99_us for turn in many) / 1000:.2f}",
            report.spread(latencies[name], ".0f"),
            ratio_cell(latencies, name),
            f"{max(max(turn.full.others_cpus, turn.alone.others_cpus) for turn in many):.2f}",
        ]
        for name, many in rounds.figures.items()
    ]
    header = [
        "server",
        f"requests/s at {_CONCURRENCY}, median (range)",
        "ours / this one",
        "p99 ms",
        "p50 µs alone, median (range)",
        "ours / this one",
        "CPUs used by others, max",
    ]
    return Table(f"{_with(workers)}:", header, rows)


def _figures(rounds: Rounds[Turn]) -> dict[str, object]:
    rates = rounds.values(lambda turn: turn.full.requests_per_s)
    return {
        "ours_to_each": {
            name: statistics.median(found) for name in rates if (found := ratios(rates, name))
        },
        "rounds": {name: [asdict(turn) for turn in many] for name, many in rounds.figures.items()},
    }


CASE = Case(_NAME, "Echo: requests/s at concurrency 32, latency at 1", _run)
