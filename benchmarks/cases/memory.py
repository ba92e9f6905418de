"""The memory of two workers that have read a model of 400 MB.

1. A peer is started with two workers. Where it has a way to load once for all, that is taken.
2. It is asked, two tasks at a time, until both workers have answered: each task reads all weights.
3. PSS is the proportional set size of its main process and all below it: a page that n processes
   share counts for 1/n in each, so the sum is what the whole of it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil

from .. import report
from ..called import exchanging
from ..candidate import Candidate
from ..goals import at_most, for_each
from ..harness import BenchmarkError, Server
from ..peers.peer import Peer
from ..rounds import Rounds, measure, ratio_cell
from .case import Case, Options, Result, Table, able, twice

_NAME = "memory"
_WORKERS = 2
_LIMIT_S = 60.0
_BODY = {"text": "read"}
_MIB = 2**20
_TO_A_BARE_POOL = 1.05


def _run(peers: Sequence[Peer], options: Options) -> Result:
    result = Result()
    chosen = able(peers, _NAME, options, result.notes, workers=_WORKERS, torch=True)
    turns = {peer.label: _turn(peer) for peer in chosen}
    rounds = measure(turns, options.rounds, lambda mib: f"{mib:.0f} MiB")
    result.notes += rounds.notes
    result.tables.append(_table(rounds))
    result.figures["pss_mib"] = rounds.figures
    bounds = {**for_each(peers, 1), "pebble-tuned": _TO_A_BARE_POOL}
    result.notes += at_most("memory", rounds.figures, peers, bounds)
    return result


def _turn(peer: Peer) -> Callable[[int], float]:
    def once() -> float:
        variables = {"OMP_NUM_THREADS": "1"}
        with exchanging(peer, "memory", _WORKERS, variables, torch=True) as candidate:
            candidate.wait_until_exchanged(_BODY)
            _have_all_read(candidate)
            pss_mib = _pss_bytes(candidate.server) / _MIB
            candidate.server.kill()
        return pss_mib

    return lambda _: twice(once)


def _have_all_read(candidate: Candidate) -> None:
    limit = time.monotonic() + _LIMIT_S
    seen: set[str] = set()
    with ThreadPoolExecutor(_WORKERS) as clients:
        while len(seen) < _WORKERS:
            if time.monotonic() > limit:
                raise BenchmarkError(f"{len(seen)} of {_WORKERS} workers have had a task")
            asked = [clients.submit(candidate.exchange, _BODY, _LIMIT_S) for _ in range(_WORKERS)]
            for answer in (one.result() for one in asked):
                if answer is not None and answer.output is not None:
                    seen.add(answer.output["text"])


def _pss_bytes(server: Server) -> int:
    first = psutil.Process(server.process.pid)
    total = 0
    for process in [first, *first.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # a helper that has done its work
            total += process.memory_full_info().pss
    return total


def _table(rounds: Rounds[float]) -> Table:
    rows = [
        [name, report.spread(mib, ".0f"), ratio_cell(rounds.figures, name)]
        for name, mib in rounds.figures.items()
    ]
    header = ["server", "PSS MiB, median (range)", "ours / this one"]
    return Table("2 workers, 400 MB of weights, each worker has read them all:", header, rows)


CASE = Case(_NAME, "Memory of two workers with a model of 400 MB", _run)
