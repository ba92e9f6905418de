"""10,000 tasks are accepted while the handler does not go on, and then all are worked off.

1. Each turn has a server of its own, with one worker and a sink. Its main process is looked at.
2. 32 connections post tasks until 10,000 are accepted (load/backlog.py); the first of them waits in
   the handler for a gate. The main process is looked at again.
3. The gate is opened, and the last delivery waited for. Every task must arrive once, with its own
   text; else there are no figures.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from .. import report
from ..candidate import Candidate
from ..harness import HOST, BenchmarkError
from ..load.backlog import LIMIT_S
from ..peers.peer import Peer
from ..rounds import Rounds, measure, ratio_cell
from .case import Case, Options, Result, Table, able
from .delivery import listens

_NAME = "backlog"
_TASKS = 10_000
_CONCURRENCY = 32
_MIB = 2**20


@dataclass(frozen=True)
class Turn:
    """One backlog, filled and worked off; the memory is the resident set of the main process."""

    accepted_per_s: float
    worked_off_s: float
    before_mib: float
    full_mib: float
    after_mib: float


def _run(peers: Sequence[Peer], options: Options) -> Result:
    result = Result()
    chosen = able(peers, _NAME, options, result.notes)
    rounds = measure({peer.label: _turn(peer) for peer in chosen}, options.rounds, _tell)
    result.notes += rounds.notes
    result.tables.append(_table(rounds))
    result.figures = {
        name: [asdict(turn) for turn in many] for name, many in rounds.figures.items()
    }
    return result


def _turn(peer: Peer) -> Callable[[int], Turn]:
    def turn(number: int) -> Turn:
        with socket.create_server((HOST, 0), backlog=1024) as sink, _serving(peer, sink) as server:
            return _fill_and_work_off(server, sink, number)

    return turn


@contextmanager
def _serving(peer: Peer, sink: socket.socket) -> Iterator[Candidate]:
    variables = {
        "BENCHMARK_GATE": "gate",  # in the server's folder, where its processes are
        "CALLBACK_URL": f"http://{HOST}:{sink.getsockname()[1]}/results",
        "OGPU_QUEUE_SIZE": str(2 * _TASKS),
    }
    with peer.serve("backlog", 1, variables) as candidate:
        candidate.server.wait_for(listens)
        yield candidate


def _fill_and_work_off(candidate: Candidate, sink: socket.socket, number: int) -> Turn:
    server = candidate.server
    front = psutil.Process(server.process.pid)
    command = [sys.executable, "-m", "benchmarks.load.backlog"]
    command += ["--port", str(server.port), "--path", candidate.path]
    command += ["--sink", str(sink.fileno()), "--tag", f"{server.port}-{number}"]
    command += ["--concurrency", str(_CONCURRENCY), "--tasks", str(_TASKS)]
    command += ["--gate", str(server.folder / "gate")]
    before = _mib(front)
    load = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        pass_fds=[sink.fileno()],
    )
    with load:
        try:
            assert load.stdout is not None
            is_full = load.stdout.readline() == "accepted\n"  # it has its own limit
            full = _mib(front) if is_full else 0.0
            told, error = load.communicate("go on\n", timeout=LIMIT_S + 10)
        finally:
            load.kill()
    if load.returncode or not is_full:
        raise BenchmarkError(f"{error.strip()}\n{server.log_tail()}")
    seen = json.loads(told)
    return Turn(_TASKS / seen["accept_s"], seen["work_off_s"], before, full, _mib(front))


def _mib(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / _MIB


def _tell(turn: Turn) -> str:
    return f"{turn.accepted_per_s:.0f} accepted/s, worked off in {turn.worked_off_s:.1f} s"


def _table(rounds: Rounds[Turn]) -> Table:
    accepted = rounds.values(lambda turn: turn.accepted_per_s)
    worked_off = rounds.values(lambda turn: turn.worked_off_s)
    rows = [
        [
            name,
            report.spread(accepted[name], ".0f"),
            ratio_cell(accepted, name),
            report.spread(worked_off[name], ".1f"),
            ratio_cell(worked_off, name),
            *(
                f"{statistics.median(values):.0f}"
                for values in zip(
                    *((t.before_mib, t.full_mib, t.after_mib) for t in many), strict=True
                )
            ),
        ]
        for name, many in rounds.figures.items()
    ]
    header = [
        "server",
        "accepted/s, median (range)",
        "ours / this one",
        "worked off in s, median (range)",
        "ours / this one",
        "main process MiB before",
        "full",
        "after",
    ]
    return Table(f"{_TASKS} tasks, 1 worker:", header, rows)


CASE = Case(_NAME, "Backlog: 10,000 tasks accepted, then worked off", _run)
