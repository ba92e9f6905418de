"""Requests/s and latency of an echo handler: this service, FastAPI inline, and Mosec.

Rounds are interleaved (ours, fastapi, mosec, ours, …) and ratios are taken within a round, so that
what else happens on the machine hits all of them. All servers are up; one is under load at a time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from . import report
from .harness import HOST, SOURCES, free_port, run, serving, serving_source
from .peer_mosec import MOSEC_VERSION, mosec_python
from .peers import InstallError, default_cache
from .wrk import Candidate, Load, checked, is_installed, load

_OURS = "ogpu-service"
_CONCURRENCY = 32
_WARM_UP_S = 1


@dataclass(frozen=True)
class Round:
    """One candidate's turn: full load, then one request at a time."""

    full: Load
    single: Load


def main() -> None:
    options = _options()
    if not is_installed():
        raise SystemExit("wrk is not installed (apt-get install wrk)")
    facts = report.environment()
    with ExitStack() as stack:
        candidates = [stack.enter_context(_ours()), stack.enter_context(_fastapi())]
        try:
            candidates.append(stack.enter_context(_mosec(options.cache)))
            facts["versions"]["mosec"] = MOSEC_VERSION
        except InstallError as error:
            print(f"Skipped: Mosec cannot be installed here ({error})", file=sys.stderr)
        rounds = _measure(candidates, options.rounds, options.seconds)
    print(f"\n{report.describe(facts)}; {options.rounds} rounds of {options.seconds} s\n")
    print(_table(rounds))
    content = {
        "benchmark": "echo",
        "environment": facts,
        "options": {"rounds": options.rounds, "seconds": options.seconds},
        "ours_to_each": {
            name: statistics.median(_ratios(rounds, name)) for name in rounds if name != _OURS
        },
        "rounds": {name: [asdict(one) for one in many] for name, many in rounds.items()},
    }
    report.write_json(options.json, content)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.echo", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each server")
    parser.add_argument("--seconds", type=int, default=5, help="length of each load (two a turn)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="where Mosec's environment is kept"
    )
    return parser.parse_args()


@contextmanager
def _ours() -> Iterator[Candidate]:
    with serving_source("echo_service.py") as server:
        yield checked(Candidate(_OURS, server, "/run/echo/", True, "wait=30"))


@contextmanager
def _fastapi() -> Iterator[Candidate]:
    port = free_port()
    with serving([sys.executable, SOURCES / "echo_fastapi.py", str(port)], port) as server:
        yield checked(Candidate("FastAPI inline", server, "/echo"))


@contextmanager
def _mosec(cache: Path) -> Iterator[Candidate]:
    python, port = mosec_python(cache), free_port()
    arguments = ["--address", HOST, "--port", str(port), "--log-level", "warning"]
    with serving([python, SOURCES / "echo_mosec.py", *arguments], port) as server:
        yield checked(Candidate(f"Mosec {MOSEC_VERSION}", server, "/inference"))


def _measure(candidates: list[Candidate], rounds: int, seconds: int) -> dict[str, list[Round]]:
    for candidate in candidates:
        load(candidate, "warm-up", _CONCURRENCY, _WARM_UP_S)
    measured: dict[str, list[Round]] = {candidate.name: [] for candidate in candidates}
    for number in range(1, rounds + 1):
        for candidate in candidates:
            full = load(candidate, f"{number}-full", _CONCURRENCY, seconds)
            single = load(candidate, f"{number}-single", 1, seconds)
            measured[candidate.name].append(Round(full, single))
            print(
                f"round {number}, {candidate.name}: {full.requests_per_s:.0f} requests/s; "
                f"alone {single.p50_us:.0f} µs; "
                f"others used {full.others_cpus:.2f} and {single.others_cpus:.2f} CPUs",
                file=sys.stderr,
            )
    return measured


def _ratios(rounds: dict[str, list[Round]], name: str) -> list[float]:
    """Return our requests/s over another's, round by round."""
    return [
        ours.full.requests_per_s / other.full.requests_per_s
        for ours, other in zip(rounds[_OURS], rounds[name], strict=True)
    ]


def _table(rounds: dict[str, list[Round]]) -> str:
    rows = [
        [
            name,
            report.spread([one.full.requests_per_s for one in many], ".0f"),
            "1" if name == _OURS else report.spread(_ratios(rounds, name), ".2f"),
            f"{statistics.median(one.full.p99_us for one in many) / 1000:.2f}",
            report.spread([one.single.p50_us for one in many], ".0f"),
            f"{max(max(one.full.others_cpus, one.single.others_cpus) for one in many):.2f}",
        ]
        for name, many in rounds.items()
    ]
    header = [
        "server",
        f"requests/s at {_CONCURRENCY}, median (range)",
        "ours / this one, median (range)",
        "p99 ms",
        "p50 µs alone, median (range)",
        "CPUs used by others, max",
    ]
    return report.table(header, rows)


if __name__ == "__main__":
    run(main)
