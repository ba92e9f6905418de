"""Accepted → delivered callbacks/s of the echo handler, one worker.

1. Every server that calls back is started, with one sink for all; and the sink itself is posted to
   straight, which is the limit of load and sink.
2. One at a time has 32 tasks on their way, in a closed loop (load/deliveries.py).
3. A task that is not delivered exactly once with its own text, and the server has no figures.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import report
from ..candidate import Candidate
from ..disk import folder_bytes
from ..goals import at_least
from ..harness import HOST, BenchmarkError
from ..load.deliveries import SLACK_S, Deliveries
from ..noise import watch_others
from ..peers.ours import Ours
from ..peers.peer import Peer
from ..rounds import Rounds, measure, ratio_cell, ratios
from .case import Case, Options, Result, Table, able, started

_NAME = "delivery"
_ALONE = "load and sink alone"
_CONCURRENCY = 32
_WARM_UP_S = 1
_EXIT_SLACK_S = 10
_LEAST = {"ogpu-frozen": 10, "ogpu-memory": 0.75}


@dataclass(frozen=True)
class Turn:
    """What one turn gave."""

    seen: Deliveries
    others_cpus: float


@dataclass(frozen=True)
class _Target:
    """Where tasks are posted to; the sink itself has no server."""

    name: str
    port: int
    path: str
    server_log: Callable[[], str]


def _run(peers: Sequence[Peer], options: Options) -> Result:
    result = Result()
    chosen = able(peers, _NAME, options, result.notes)
    with ExitStack() as stack:
        sink = stack.enter_context(socket.create_server((HOST, 0), backlog=1024))
        url = f"http://{HOST}:{sink.getsockname()[1]}/results"

        def start(own: ExitStack, peer: Peer) -> Candidate:
            candidate = own.enter_context(peer.serve("echo", 1, {"CALLBACK_URL": url}))
            candidate.server.wait_for(listens)
            _deliver(_target(candidate), 0, sink, _WARM_UP_S)
            return candidate

        candidates = dict(started(stack, chosen, result.notes, start))
        targets = [_target(candidate) for candidate in candidates.values()]
        targets.append(_Target(_ALONE, sink.getsockname()[1], "/results/", str))
        rounds = measure(
            {target.name: _turn(target, sink, options.seconds) for target in targets},
            options.rounds,
            _tell,
        )
        for peer, candidate in candidates.items():
            _check_kept(peer, candidate, rounds)
    result.notes += rounds.notes
    result.tables.append(_table(rounds))
    result.figures = _figures(rounds)
    rates = rounds.values(lambda turn: turn.seen.delivered_per_s)
    result.notes += at_least("delivered/s", rates, peers, _LEAST)
    return result


def listens(connection: http.client.HTTPConnection) -> bool:
    """Ask both services, of which the frozen one has no readiness; a task would be delivered."""
    connection.request("GET", "/openapi.json")
    return connection.getresponse().status == 200


def _target(candidate: Candidate) -> _Target:
    server = candidate.server
    return _Target(candidate.name, server.port, candidate.path, server.log_tail)


def _turn(target: _Target, sink: socket.socket, seconds: int) -> Callable[[int], Turn]:
    return lambda number: _deliver(target, number, sink, seconds)


def _deliver(target: _Target, number: int, sink: socket.socket, seconds: int) -> Turn:
    tag = f"{target.port}-{number}"  # no other run has these addresses
    command = [sys.executable, "-m", "benchmarks.load.deliveries"]
    command += ["--port", str(target.port), "--path", target.path]
    command += ["--sink", str(sink.fileno()), "--tag", tag]
    command += ["--concurrency", str(_CONCURRENCY), "--seconds", str(seconds)]
    others_cpus = watch_others(os.getpid())
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        pass_fds=[sink.fileno()],
        timeout=seconds + SLACK_S + _EXIT_SLACK_S,
        check=False,
    )
    if done.returncode:
        raise BenchmarkError(f"{done.stderr.strip()}\n{target.server_log()}")
    return Turn(Deliveries(**json.loads(done.stdout)), others_cpus())


def _tell(turn: Turn) -> str:
    return f"{turn.seen.delivered_per_s:.0f} delivered/s; others used {turn.others_cpus:.2f} CPUs"


def _check_kept(peer: Peer, candidate: Candidate, rounds: Rounds[Turn]) -> None:
    """See that the durable one has kept anything at all: else its figure is another's."""
    if isinstance(peer, Ours) and not peer.state_dir.startswith(":"):
        kept = folder_bytes(candidate.server.folder / peer.state_dir)
        if not kept and candidate.name in rounds.figures:
            rounds.drop(candidate.name, BenchmarkError("nothing was kept in its OGPU_STATE_DIR"))


def _table(rounds: Rounds[Turn]) -> Table:
    rates = rounds.values(lambda turn: turn.seen.delivered_per_s)
    rows = [
        [
            name,
            report.spread(rates[name], ".0f"),
            ratio_cell(rates, name),
            _middle(turn.seen.accepted_p50_ms for turn in many),
            _middle(turn.seen.p50_ms for turn in many),
            _middle(turn.seen.p99_ms for turn in many),
            _middle(turn.seen.load_cpus for turn in many),
            f"{max(turn.others_cpus for turn in many):.2f}",
        ]
        for name, many in rounds.figures.items()
    ]
    header = [
        "server",
        f"delivered/s at {_CONCURRENCY}, median (range)",
        "ours / this one",
        "posted → accepted p50 ms",
        "accepted → delivered p50 ms",
        "p99 ms",
        "CPUs used by load and sink",
        "by others, max",
    ]
    return Table("1 worker:", header, rows)


def _middle(values: Iterable[float]) -> str:
    return f"{statistics.median(values):.2f}"


def _figures(rounds: Rounds[Turn]) -> dict[str, object]:
    rates = rounds.values(lambda turn: turn.seen.delivered_per_s)
    return {
        "ours_to_each": {
            name: statistics.median(found) for name in rates if (found := ratios(rates, name))
        },
        "rounds": {name: [asdict(turn) for turn in many] for name, many in rounds.figures.items()},
    }


CASE = Case(_NAME, "Delivery: accepted → delivered callbacks/s", _run)
