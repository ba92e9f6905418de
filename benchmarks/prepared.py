"""A model of 400 MB that @prepare has loaded: the memory of two workers, and a kill of one.

A. PSS: the proportional set size of all processes of the service (front, template, workers, a
   standby), after each worker has read the whole model; with one worker, and with two. A page that
   n processes share counts for 1/n in each, so the sum is what the service takes.
B. deadline → next result: as in ``kills.py``, with one worker. Where there is a standby, it has
   imported the source and prepared it before each kill.

Three ways to make workers: by fork, by spawn, and by spawn with a standby.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from . import report
from .harness import BenchmarkError, Server, answer, get, is_ready, post, run, serving_source
from .kills import kill_once, ready_worker

WAYS = {
    "fork": {"OGPU_START_METHOD": "fork"},
    "spawn": {"OGPU_START_METHOD": "spawn", "OGPU_STANDBY": "0"},
    "spawn, standby": {"OGPU_START_METHOD": "spawn", "OGPU_STANDBY": "1"},
}
_GOAL_NEXT_MS = 150
_GOAL_RATIO = 1.3
_LIMIT_S = 60.0
_STILL_S = 0.5  # a standby that has used no CPU for so long has nothing left to do
_BODY = {"text": "hello"}
_MIB = 2**20


@dataclass(frozen=True)
class Way:
    """What one way of making workers costs."""

    one_worker_bytes: int
    two_workers_bytes: int
    next_ms: list[float]

    @property
    def ratio(self) -> float:
        return self.two_workers_bytes / self.one_worker_bytes


def main() -> None:
    options = _options()
    facts = report.environment()
    ways = {name: _measure(name, options.repeat) for name in WAYS}
    print(f"\n{report.describe(facts)}; {options.repeat} kills each, timeout 0.2 s\n")
    print(_table(ways))
    fork = ways["fork"]
    next_ms = statistics.median(fork.next_ms)
    print(
        f"\nGoals, with fork: at most {_GOAL_RATIO} times the memory with two workers, "
        f"{_reached(fork.ratio <= _GOAL_RATIO)} ({fork.ratio:.2f}); next result in less than "
        f"{_GOAL_NEXT_MS} ms, {_reached(next_ms < _GOAL_NEXT_MS)} ({next_ms:.1f} at the median)."
    )
    content = {
        "benchmark": "prepared",
        "environment": facts,
        "options": {"repeat": options.repeat},
        "ways": {name: asdict(way) for name, way in ways.items()},
    }
    report.write_json(options.json, content)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepared", description=__doc__)
    parser.add_argument("--repeat", type=int, default=10, help="kills for each way")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def _measure(name: str, repeat: int) -> Way:
    variables = WAYS[name]
    with serving_source("prepared.py", {**variables, "OGPU_WORKERS": "2"}) as server:
        server.wait_for(is_ready)
        two_workers_bytes = _pss_bytes(server, name)
    with serving_source("prepared.py", variables) as server:
        server.wait_for(is_ready)
        one_worker_bytes = _pss_bytes(server, name)
        next_ms = [_next_ms(server, name) for _ in range(repeat)]
    way = Way(one_worker_bytes, two_workers_bytes, next_ms)
    print(
        f"{name}: {one_worker_bytes / _MIB:.0f} and {two_workers_bytes / _MIB:.0f} MiB, "
        f"next result {report.spread(next_ms, '.1f')} ms",
        file=sys.stderr,
    )
    return way


def _pss_bytes(server: Server, way: str) -> int:
    """Have every worker read the model; return the memory of all processes of the service."""
    pids = _all_ready(server)
    seen: set[int] = set()
    limit = time.monotonic() + _LIMIT_S
    number = 0
    while seen != pids:
        if time.monotonic() > limit:
            raise BenchmarkError(f"not every worker has had a task: {seen} of {pids}")
        # Two at once, so that both workers get one.
        connections = [server.connect() for _ in pids]
        for connection in connections:
            number += 1
            post(connection, f"/run/predict/read-{number}", _BODY, {"prefer": "wait=30"})
        for connection in connections:
            seen.add(answer(connection)["worker"]["pid"])
            connection.close()
    if way == "spawn, standby":
        _wait_for_standby(server)
    front = psutil.Process(server.process.pid)
    everyone = [front, *front.children(recursive=True)]
    return sum(process.memory_full_info().pss for process in everyone)


def _all_ready(server: Server) -> set[int]:
    limit = time.monotonic() + _LIMIT_S
    connection = server.connect()
    try:
        while time.monotonic() < limit:
            slots = get(connection, "/workers")["workers"]
            if all(slot["state"] == "ready" for slot in slots):
                return {slot["pid"] for slot in slots}
            time.sleep(0.05)
    finally:
        connection.close()
    raise BenchmarkError(f"not all workers were ready within {_LIMIT_S:g} s: {slots}")


def _next_ms(server: Server, way: str) -> float:
    connection = server.connect()
    try:
        ready_worker(connection)
    finally:
        connection.close()
    if way == "spawn, standby":
        _wait_for_standby(server)
    return kill_once(server, "hang").next_ms


def _wait_for_standby(server: Server) -> None:
    """Wait until the standby waits, too."""
    limit = time.monotonic() + _LIMIT_S
    used_s, since = -1.0, time.monotonic()
    while time.monotonic() < limit:
        below = psutil.Process(server.process.pid).children(recursive=True)
        standbys = [p for p in below if p.cmdline()[:1] == ["ogpu-service: standby"]]
        now_s = sum(sum(p.cpu_times()[:2]) for p in standbys)
        if now_s != used_s or not standbys:
            used_s, since = now_s, time.monotonic()
        elif time.monotonic() - since > _STILL_S:
            return
        time.sleep(0.02)
    raise BenchmarkError(f"no standby within {_LIMIT_S:g} s")


def _table(ways: dict[str, Way]) -> str:
    header = [
        "workers are made by",
        "PSS MiB, 1 worker",
        "2 workers",
        "ratio",
        "next result ms p50",
        "max",
    ]
    rows = [
        [
            name,
            f"{way.one_worker_bytes / _MIB:.0f}",
            f"{way.two_workers_bytes / _MIB:.0f}",
            f"{way.ratio:.2f}",
            f"{statistics.median(way.next_ms):.1f}",
            f"{max(way.next_ms):.1f}",
        ]
        for name, way in ways.items()
    ]
    return report.table(header, rows)


def _reached(is_reached: bool) -> str:
    return "reached" if is_reached else "**not reached**"


if __name__ == "__main__":
    run(main)
