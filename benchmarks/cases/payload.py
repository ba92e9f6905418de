"""MiB/s each way of the echo handler with large texts: 1 MiB and 10 MiB, in JSON, in and out.

1. Every peer's server is started with one worker, and asked until it answers.
2. One at a time has four requests of a size on their way (load/payloads.py), each answer compared.
"""

from __future__ import annotations

import random
import statistics
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict

from .. import report
from ..candidate import Candidate
from ..goals import at_least, for_each
from ..load.payloads import Exchange, exchange
from ..peers.peer import Peer
from ..rounds import Rounds, measure, ratio_cell, ratios
from .case import Case, Options, Result, Table, able, started

_NAME = "payload"
_SIZES_MIB = (1, 10)
_CONCURRENCY = 4
_WARM_UP_S = 1
_SMALL = {"text": "hello"}


def _run(peers: Sequence[Peer], options: Options) -> Result:
    result = Result()
    chosen = able(peers, _NAME, options, result.notes)
    for size_mib in _SIZES_MIB:
        rounds = _measure(chosen, size_mib, options, result.notes)
        result.tables.append(_table(rounds, size_mib))
        result.figures[f"{size_mib} MiB"] = _figures(rounds, size_mib)
        if size_mib == 1:
            rates = rounds.values(lambda seen: seen.requests_per_s)
            result.notes += at_least("MiB/s of 1 MiB", rates, peers, for_each(peers, 1))
    return result


def _measure(
    peers: Sequence[Peer], size_mib: int, options: Options, notes: list[str]
) -> Rounds[Exchange]:
    # Letters at random: a text that compresses or repeats could flatter somebody.
    letters = random.Random(size_mib).choices(string.ascii_letters, k=size_mib * 2**20)
    data = {"text": "".join(letters)}

    def start(stack: ExitStack, peer: Peer) -> Candidate:
        candidate = stack.enter_context(peer.serve("echo", 1))
        candidate.wait_until_answered(_SMALL, _SMALL)
        exchange(candidate, data, "warm-up", _CONCURRENCY, _WARM_UP_S)
        return candidate

    with ExitStack() as stack:
        turns = {
            peer.label: _turn(candidate, data, options.seconds)
            for peer, candidate in started(stack, peers, notes, start, f"{size_mib} MiB: ")
        }
        rounds = measure(turns, options.rounds, lambda seen: _tell(seen, size_mib))
    notes += [f"{size_mib} MiB: {note}" for note in rounds.notes]
    return rounds


def _turn(candidate: Candidate, data: Mapping[str, str], seconds: int) -> Callable[[int], Exchange]:
    return lambda number: exchange(candidate, data, str(number), _CONCURRENCY, seconds)


def _tell(seen: Exchange, size_mib: int) -> str:
    return (
        f"{seen.requests_per_s * size_mib:.0f} MiB/s each way; the load used {seen.load_cpus:.2f}, "
        f"others {seen.others_cpus:.2f} CPUs"
    )


def _table(rounds: Rounds[Exchange], size_mib: int) -> Table:
    rates = rounds.values(lambda seen: seen.requests_per_s * size_mib)
    rows = [
        [
            name,
            report.spread(rates[name], ".0f"),
            ratio_cell(rates, name),
            f"{statistics.median(seen.p50_ms for seen in many):.1f}",
            f"{statistics.median(seen.load_cpus for seen in many):.2f}",
            f"{max(seen.others_cpus for seen in many):.2f}",
        ]
        for name, many in rounds.figures.items()
    ]
    header = [
        "server",
        "MiB/s each way, median (range)",
        "ours / this one",
        "p50 ms",
        "CPUs used by the load",
        "by others, max",
    ]
    return Table(f"{size_mib} MiB, {_CONCURRENCY} requests at once, 1 worker:", header, rows)


def _figures(rounds: Rounds[Exchange], size_mib: int) -> dict[str, object]:
    rates = rounds.values(lambda seen: seen.requests_per_s * size_mib)
    return {
        "ours_to_each": {
            name: statistics.median(found) for name in rates if (found := ratios(rates, name))
        },
        "mib_per_s": rates,
        "rounds": {name: [asdict(seen) for seen in many] for name, many in rounds.figures.items()},
    }


CASE = Case(_NAME, "Payload: MiB/s of large bodies, in and out", _run)
