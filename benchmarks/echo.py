"""Requests/s and latency of an echo handler: this service, FastAPI inline, and Mosec.

Rounds are interleaved (ours, fastapi, mosec, ours, …) and ratios are taken within a round, so that
what else happens on the machine hits all of them. All servers are up; one is under load at a time.
"""

from __future__ import annotations

import argparse
import http.client
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from . import report
from .harness import (
    HOST,
    SOURCES,
    BenchmarkError,
    Server,
    answer,
    free_port,
    post,
    run,
    serving,
    serving_source,
)
from .noise import watch_others
from .peer_mosec import MOSEC_VERSION, InstallError, default_cache, mosec_python

_OURS = "ogpu-service"
_SCRIPT = Path(__file__).with_name("echo.lua")
_BODY = {"text": "hello world"}
_CONCURRENCY = 32
_WARM_UP_S = 1
_WRK_SLACK_S = 30
_RESULT = re.compile(r"^RESULT (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Candidate:
    """A server under test, and how it is asked."""

    name: str
    server: Server
    path: str
    numbered: bool = False  # a path of its own for each request
    prefer: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.prefer is None else {"prefer": self.prefer}


@dataclass(frozen=True)
class Load:
    """What wrk saw in one run."""

    requests_per_s: float
    p50_us: float
    p99_us: float
    others_cpus: float


@dataclass(frozen=True)
class Round:
    """One candidate's turn: full load, then one request at a time."""

    full: Load
    single: Load


def main() -> None:
    options = _options()
    if shutil.which("wrk") is None:
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
        yield _checked(Candidate(_OURS, server, "/run/echo/", True, "wait=30"))


@contextmanager
def _fastapi() -> Iterator[Candidate]:
    port = free_port()
    with serving([sys.executable, SOURCES / "echo_fastapi.py", str(port)], port) as server:
        yield _checked(Candidate("FastAPI inline", server, "/echo"))


@contextmanager
def _mosec(cache: Path) -> Iterator[Candidate]:
    python, port = mosec_python(cache), free_port()
    arguments = ["--address", HOST, "--port", str(port), "--log-level", "warning"]
    with serving([python, SOURCES / "echo_mosec.py", *arguments], port) as server:
        yield _checked(Candidate(f"Mosec {MOSEC_VERSION}", server, "/inference"))


def _checked(candidate: Candidate) -> Candidate:
    """Wait until it answers, and see that it answers what was said to it."""

    def echoes(connection: http.client.HTTPConnection) -> bool:
        path = candidate.path + ("check" if candidate.numbered else "")
        post(connection, path, _BODY, candidate.headers)
        given = answer(connection)
        if (given["result"] if candidate.numbered else given) != _BODY:
            raise BenchmarkError(f"{candidate.name} answers {given}")
        return True

    candidate.server.wait_for(echoes)
    return candidate


def _measure(candidates: list[Candidate], rounds: int, seconds: int) -> dict[str, list[Round]]:
    for candidate in candidates:
        _load(candidate, "warm-up", _CONCURRENCY, _WARM_UP_S)
    measured: dict[str, list[Round]] = {candidate.name: [] for candidate in candidates}
    for number in range(1, rounds + 1):
        for candidate in candidates:
            full = _load(candidate, f"{number}-full", _CONCURRENCY, seconds)
            single = _load(candidate, f"{number}-single", 1, seconds)
            measured[candidate.name].append(Round(full, single))
            print(
                f"round {number}, {candidate.name}: {full.requests_per_s:.0f} requests/s; "
                f"alone {single.p50_us:.0f} µs; "
                f"others used {full.others_cpus:.2f} and {single.others_cpus:.2f} CPUs",
                file=sys.stderr,
            )
    return measured


def _load(candidate: Candidate, tag: str, concurrency: int, seconds: int) -> Load:
    path = f"{candidate.path}{tag}-" if candidate.numbered else candidate.path
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{seconds}s", "-s", str(_SCRIPT)]
    command += [f"http://{HOST}:{candidate.server.port}", "--"]
    command += [path, "numbered" if candidate.numbered else "same"]
    if candidate.prefer is not None:
        command.append(candidate.prefer)
    others_cpus = watch_others(candidate.server.process.pid)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + _WRK_SLACK_S, check=False
    )
    found = _RESULT.search(done.stdout)
    if done.returncode or found is None:
        raise BenchmarkError(f"wrk failed:\n{done.stdout}{done.stderr}")
    figures = {name: float(value) for name, value in (f.split("=") for f in found[1].split())}
    errors = {
        name: int(figures[name])
        for name in ("status", "connect", "read", "write", "timeout")
        if figures[name]
    }
    if errors or not figures["requests"]:
        raise BenchmarkError(
            f"{candidate.name} gave errors: {errors} in {figures['requests']:.0f} requests\n"
            f"{candidate.server.log_tail()}"
        )
    requests_per_s = figures["requests"] / figures["duration_us"] * 1e6
    return Load(requests_per_s, figures["p50_us"], figures["p99_us"], others_cpus())


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
