"""What a worker that floods its stdout costs everybody else.

Two workers. One writes to stdout as fast as it can, in several ways; meanwhile one client sends
small tasks to the other one after another, and a second asks for /healthz every few milliseconds.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from . import report
from .harness import Server, answer, get, is_ready, post, run, serving_source
from .sources.floods import BLOCKS

_HEALTH_EVERY_S = 0.005
_WAIT = {"Prefer": "wait=60"}


@dataclass(frozen=True)
class Cost:
    """What was seen while one kind of flood ran."""

    kind: str
    flood_mb_per_s: float
    echoes_per_s: float
    health_ms: list[float]
    loop_lag_ms: float  # the mean of ogpu_loop_lag_seconds
    front_cpu: float  # of one core
    front_rss_mb: tuple[float, float]  # before, greatest
    log_mb: float


def main() -> None:
    options = _options()
    facts = report.environment()
    costs = []
    for kind in options.kinds:
        print(kind, file=sys.stderr)
        with serving_source("floods.py", {"OGPU_WORKERS": "2"}) as server:
            server.wait_for(is_ready)
            costs.append(_measure(server, kind, options.seconds))
    print(f"\n{report.describe(facts)}; {options.seconds:g} s each\n")
    print(_table(costs))
    content = {
        "benchmark": "floods",
        "environment": facts,
        "options": {"seconds": options.seconds},
        "costs": [asdict(cost) for cost in costs],
    }
    report.write_json(options.json, content)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.floods", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each flood lasts")
    parser.add_argument("--kinds", nargs="+", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def _measure(server: Server, kind: str, seconds: float) -> Cost:
    process = psutil.Process(server.process.pid)
    _echo_once(server)
    rss_before, cpu_before = process.memory_info().rss, sum(process.cpu_times()[:2])
    lag_before = _lag(server)
    log = server.folder / "log"
    log_before = log.stat().st_size
    over = threading.Event()
    health_ms: list[float] = []
    echoes: list[float] = []
    rss: list[int] = [rss_before]
    started = time.monotonic()
    threads = [
        threading.Thread(target=work)
        for work in (
            lambda: _ask_health(server, over, health_ms),
            lambda: _echo(server, over, echoes),
            lambda: _watch(process, over, rss),
        )
    ]
    for thread in threads:
        thread.start()
    connection = server.connect()
    post(connection, "/run/flood/flood", {"kind": kind, "seconds": seconds}, _WAIT)
    written = int(answer(connection)["result"]["text"])
    took_s = time.monotonic() - started
    cpu = sum(process.cpu_times()[:2]) - cpu_before
    over.set()
    for thread in threads:
        thread.join()
    lag = _lag(server)
    return Cost(
        kind,
        written / 1e6 / took_s,
        len(echoes) / took_s,
        health_ms,
        1000 * (lag[0] - lag_before[0]) / (lag[1] - lag_before[1]),
        cpu / took_s,
        (rss_before / 1e6, max(rss) / 1e6),
        (log.stat().st_size - log_before) / 1e6,
    )


def _repeat(server: Server, over: threading.Event, what: Callable[..., object]) -> None:
    connection = server.connect()
    while not over.is_set():
        what(connection)
    connection.close()


def _ask_health(server: Server, over: threading.Event, took_ms: list[float]) -> None:
    connection = server.connect()
    while not over.wait(_HEALTH_EVERY_S):
        asked = time.perf_counter()
        get(connection, "/healthz")
        took_ms.append(1000 * (time.perf_counter() - asked))
    connection.close()


def _echo(server: Server, over: threading.Event, took_ms: list[float]) -> None:
    connection = server.connect()
    while not over.is_set():
        asked = time.perf_counter()
        post(connection, f"/run/echo/e{len(took_ms)}", {"text": "x"}, _WAIT)
        answer(connection)
        took_ms.append(1000 * (time.perf_counter() - asked))
    connection.close()


def _echo_once(server: Server) -> None:
    connection = server.connect()
    for number in range(20):
        post(connection, f"/run/echo/warm{number}", {"text": "x"}, _WAIT)
        answer(connection)
    connection.close()


def _watch(process: psutil.Process, over: threading.Event, rss: list[int]) -> None:
    while not over.wait(0.05):
        rss.append(process.memory_info().rss)


def _lag(server: Server) -> tuple[float, float]:
    """Return the sum and the count of the loop's lag."""
    connection = server.connect()
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = [
        float(re.findall(rf"^ogpu_loop_lag_seconds_{name} (\S+)", text, re.MULTILINE)[0])
        for name in ("sum", "count")
    ]
    return found[0], found[1]


def _table(costs: list[Cost]) -> str:
    rows = [
        [
            cost.kind,
            f"{cost.flood_mb_per_s:.0f}",
            f"{cost.echoes_per_s:.0f}",
            f"{statistics.median(cost.health_ms):.1f}",
            f"{report.percentile(cost.health_ms, 99):.1f}",
            f"{max(cost.health_ms):.1f}",
            f"{cost.loop_lag_ms:.1f}",
            f"{cost.front_cpu:.2f}",
            f"{cost.front_rss_mb[0]:.0f} → {cost.front_rss_mb[1]:.0f}",
            f"{cost.log_mb:.1f}",
        ]
        for cost in costs
    ]
    header = [
        "flood", "MB/s", "echoes/s", "healthz ms, median", "p99", "max", "loop lag ms, mean",
        "front's CPU", "front's RSS MB", "log MB",
    ]  # fmt: skip
    return report.table(header, rows)


if __name__ == "__main__":
    run(main)
