"""Tasks per second of one PyTorch model on a CPU: one by one, and in batches of up to 8.

One server with one worker and both handlers (sources/batching.py), one core for the model. Clients
in closed loops keep 32 tasks waiting, each with `Prefer: wait`; turns of the two handlers
alternate, so that a ratio compares neighbours in time. A turn counts the tasks that ended in it,
and every answer must be a task that succeeded. How large the batches were is read from /metrics.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from . import report
from .harness import BenchmarkError, Server, answer, is_ready, post, run, serving_source

_HANDLERS = ("alone", "batched")
_CLIENTS = 32
_WAIT_S = 30
_BODY = {"values": [0.1 * number for number in range(16)]}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Turn:
    """One handler under load for a while."""

    handler: str
    tasks_per_s: float


def main() -> None:
    options = _options()
    facts = report.environment()
    # One core for the model: the front and the clients need another one, and two threads of OpenMP
    # that wait for each other are no measure where one of them does not get its core.
    with serving_source("batching.py", {"OMP_NUM_THREADS": "1"}) as server:
        server.wait_for(is_ready)
        for handler in _HANDLERS:
            _load(server, handler, 1.0)  # the first tasks of each warm PyTorch up
        turns = []
        for number, handler in itertools.product(range(1, options.rounds + 1), _HANDLERS):
            turn = Turn(handler, _load(server, handler, options.seconds))
            print(f"round {number}, {handler}: {turn.tasks_per_s:.0f} tasks/s", file=sys.stderr)
            turns.append(turn)
        batch_size = _mean_batch_size(server)
    print(f"\n{report.describe(facts)}; {options.rounds} rounds of {options.seconds:g} s\n")
    print(_table(turns, batch_size))
    content = {
        "benchmark": "batching",
        "environment": facts,
        "options": {name: getattr(options, name) for name in ("rounds", "seconds")},
        "mean_batch_size": batch_size,
        "turns": [asdict(turn) for turn in turns],
    }
    report.write_json(options.json, content)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batching", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _load(server: Server, handler: str, seconds: float) -> float:
    """Return the tasks per second that all clients together got an answer for."""
    started = time.monotonic()
    with ThreadPoolExecutor(_CLIENTS) as clients:
        loops = [
            clients.submit(_run_tasks, server, handler, started + seconds) for _ in range(_CLIENTS)
        ]
        ended = sum(loop.result() for loop in loops)
    return ended / seconds


def _run_tasks(server: Server, handler: str, until: float) -> int:
    """Run one task after the other; return how many have ended in time."""
    connection = server.connect()
    ended = 0
    try:
        while True:
            post(
                connection,
                f"/run/{handler}/0x{next(_numbers)}",
                _BODY,
                {"prefer": f"wait={_WAIT_S}"},
            )
            task = answer(connection)
            if task.get("state") != "succeeded":
                raise BenchmarkError(f"a task of {handler} did not succeed: {task}")
            if time.monotonic() > until:
                return ended
            ended += 1
    finally:
        connection.close()


def _mean_batch_size(server: Server) -> float:
    connection = server.connect()
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    found = {
        part: float(value)
        for part, value in re.findall(
            r'^ogpu_batch_size_(sum|count)\{function="batched"\} (\S+)$', text, re.MULTILINE
        )
    }
    return found["sum"] / found["count"]


def _table(turns: list[Turn], batch_size: float) -> str:
    rates = {name: [t.tasks_per_s for t in turns if t.handler == name] for name in _HANDLERS}
    ratios = [b / a for a, b in zip(rates["alone"], rates["batched"], strict=True)]
    rows = [
        ("alone", "1", report.spread(rates["alone"], ".0f"), "1"),
        (
            "batch_size=8",
            f"{batch_size:.2f}",
            report.spread(rates["batched"], ".0f"),
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})",
        ),
    ]
    header = ("handler", "tasks in a batch, mean", "tasks/s, median (range)", "times alone, median")
    return report.table(header, rows)


if __name__ == "__main__":
    run(main)
