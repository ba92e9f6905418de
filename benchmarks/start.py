"""From ``python source.py`` to the first 200 of /readyz, beside what the source itself takes.

The source alone: the same file in a fresh interpreter with start() patched to return, then its
@init; that includes ``import ogpu.service``. The difference is what the service adds: the template,
the web server, the first worker. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import select
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from . import report
from .harness import SOURCES, START_LIMIT_S, BenchmarkError, is_ready, run, serving_source

_SOURCES = {"trivial": None, "with_torch": "torch"}  # name: a module that it needs
# Short beside what is measured, long beside what asking costs (0.1 ms on the same machine).
_POLL_S = 0.002
# The moment is told through a pipe, not by the process's end: tearing torch down takes its time.
_ALONE = """
import os, runpy, sys
import ogpu.service
from ogpu.service.handler import get_init_handler
ogpu.service.start = lambda: None
sys.path[0] = os.path.dirname(sys.argv[1])
runpy.run_path(sys.argv[1], run_name="__main__")
get_init_handler()()
os.write(1, b"x")
os._exit(0)
"""


@dataclass(frozen=True)
class Start:
    """One start (seconds)."""

    ready_s: float
    alone_s: float

    @property
    def added_s(self) -> float:
        return self.ready_s - self.alone_s


def main() -> None:
    options = _options()
    facts = report.environment()
    names = []
    for name, needed in _SOURCES.items():
        if needed is not None and importlib.util.find_spec(needed) is None:
            print(f"Skipped: {name} needs {needed}, which is not installed here", file=sys.stderr)
        else:
            names.append(name)
    starts: dict[str, list[Start]] = {name: [] for name in names}
    for number in range(options.rounds + 1):
        for name in names:
            start = Start(_ready_s(f"{name}.py"), _alone_s(f"{name}.py"))
            print(
                f"round {number}, {name}: ready {start.ready_s:.3f} s, alone {start.alone_s:.3f} s",
                file=sys.stderr,
            )
            if number:  # the first one of each reads files that the others find in memory
                starts[name].append(start)
    print(f"\n{report.describe(facts)}; {options.rounds} rounds\n")
    print(_table(starts))
    content = {
        "benchmark": "start",
        "environment": facts,
        "options": {"rounds": options.rounds},
        "starts": {name: [asdict(start) for start in many] for name, many in starts.items()},
    }
    report.write_json(options.json, content)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="starts of each source")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def _ready_s(source: str) -> float:
    started = time.perf_counter()
    ready_at = 0.0

    def note_ready(connection: http.client.HTTPConnection) -> bool:
        nonlocal ready_at
        ready = is_ready(connection)
        ready_at = time.perf_counter()
        return ready

    with serving_source(source) as server:
        server.wait_for(note_ready, _POLL_S)
    return ready_at - started


def _alone_s(source: str) -> float:
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _ALONE, str(SOURCES / source)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        told, _, _ = select.select([process.stdout], [], [], START_LIMIT_S)
        took_s = time.perf_counter() - started
        if not told or process.stdout.read(1) != b"x":
            raise BenchmarkError(f"{source} alone did not come to its end")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return took_s


def _table(starts: dict[str, list[Start]]) -> str:
    rows = [
        [
            name,
            report.spread([start.ready_s for start in many], ".3f"),
            report.spread([start.alone_s for start in many], ".3f"),
            f"{statistics.median(start.added_s for start in many):.3f}",
        ]
        for name, many in starts.items()
    ]
    header = [
        "source",
        "start → ready s, median (range)",
        "imports + init alone s, median (range)",
        "the service adds s, median",
    ]
    return report.table(header, rows)


if __name__ == "__main__":
    run(main)
