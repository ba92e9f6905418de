"""Tasks/s of one PyTorch model on a CPU: one by one, and in batches of up to 8.

1. Every peer that batches is started twice with one worker and one core for the model: the front
   and the load need another one, and two threads of OpenMP that wait for each other are no measure
   where one of them does not get its core. A batch waits for others for 10 ms at most, where that
   can be said.
2. One at a time is under the load of wrk, 32 connections.
3. Then 32 tasks are put to it at once, and each answer says how many the model was given with it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from .. import report
from ..candidate import Candidate
from ..harness import BenchmarkError
from ..load.wrk import Load, is_installed, load
from ..peers.peer import Peer
from ..rounds import Rounds, measure, ratio_cell, ratios
from .case import Case, Options, Result, Table, able, started

_NAME = "batching"
_BODY = {"values": [0.1 * number for number in range(16)]}
_BATCH_SIZE = 8
_CLIENTS = 32
_WARM_UP_S = 1
_ONE_BY_ONE = {"OMP_NUM_THREADS": "1"}
_BATCHED = {**_ONE_BY_ONE, "BENCHMARK_BATCH_SIZE": str(_BATCH_SIZE)}


@dataclass(frozen=True)
class Turn:
    """Both ways, one after the other, and how large the batches were."""

    alone: Load
    batched: Load
    together: float


@dataclass(frozen=True)
class _Pair:
    alone: Candidate
    batched: Candidate


def _run(peers: Sequence[Peer], options: Options) -> Result:
    if not is_installed():
        raise BenchmarkError("wrk is not installed (apt-get install wrk)")
    result = Result()
    chosen = able(peers, _NAME, options, result.notes, torch=True)

    def start(stack: ExitStack, peer: Peer) -> _Pair:
        one, many = (
            stack.enter_context(peer.serve(_NAME, 1, variables, torch=True))
            for variables in (_ONE_BY_ONE, _BATCHED)
        )
        for candidate in (one, many):
            candidate.wait_until_answered(_BODY)
            load(candidate, _BODY, "warm-up", _CLIENTS, _WARM_UP_S)
        return _Pair(one, many)

    with ExitStack() as stack:
        turns = {
            peer.label: _turn(pair, options.seconds)
            for peer, pair in started(stack, chosen, result.notes, start)
        }
        rounds = measure(turns, options.rounds, _tell)
    result.notes += rounds.notes
    result.tables.append(_table(rounds))
    result.figures = _figures(rounds)
    return result


def _turn(pair: _Pair, seconds: int) -> Callable[[int], Turn]:
    return lambda number: Turn(
        load(pair.alone, _BODY, f"{number}", _CLIENTS, seconds),
        load(pair.batched, _BODY, f"{number}", _CLIENTS, seconds),
        _mean_batch_size(pair.batched),
    )


def _mean_batch_size(candidate: Candidate) -> float:
    """Put 32 tasks to it at once; return the mean over the batches that they made."""
    with ThreadPoolExecutor(_CLIENTS) as clients:
        sizes = [one["together"] for one in clients.map(candidate.ask, [_BODY] * _CLIENTS)]
    return len(sizes) / sum(
        1 / float(size) for size in sizes
    )  # each batch is told once by each task


def _tell(turn: Turn) -> str:
    return (
        f"{turn.alone.requests_per_s:.0f} tasks/s one by one, {turn.batched.requests_per_s:.0f} in "
        f"batches of {turn.together:.1f}"
    )


def _table(rounds: Rounds[Turn]) -> Table:
    alone = rounds.values(lambda turn: turn.alone.requests_per_s)
    batched = rounds.values(lambda turn: turn.batched.requests_per_s)
    rows = [
        [
            name,
            report.spread(alone[name], ".0f"),
            report.spread(batched[name], ".0f"),
            report.spread(
                [turn.batched.requests_per_s / turn.alone.requests_per_s for turn in many], ".2f"
            ),
            ratio_cell(batched, name),
            f"{statistics.median(turn.together for turn in many):.1f}",
            f"{max(max(turn.alone.others_cpus, turn.batched.others_cpus) for turn in many):.2f}",
        ]
        for name, many in rounds.figures.items()
    ]
    header = [
        "server",
        "tasks/s one by one, median (range)",
        f"in batches of up to {_BATCH_SIZE}",
        "batches / one by one",
        "in batches, ours / this one",
        "tasks in a batch",
        "CPUs used by others, max",
    ]
    return Table(f"{_CLIENTS} clients, 1 worker, 1 core for the model:", header, rows)


def _figures(rounds: Rounds[Turn]) -> dict[str, object]:
    batched = rounds.values(lambda turn: turn.batched.requests_per_s)
    return {
        "ours_to_each": {
            name: statistics.median(found) for name in batched if (found := ratios(batched, name))
        },
        "rounds": {name: [asdict(turn) for turn in many] for name, many in rounds.figures.items()},
    }


CASE = Case(_NAME, "Batching: tasks/s of a model, one by one and in batches of 8", _run)
