"""Accepted → delivered callbacks/s of an echo handler: this service, durable and in memory, and
the frozen module; and what durability costs where the client waits for the answer.

Rounds are interleaved and ratios are taken within a round, so that what else happens on the machine
hits all of them. All servers are up; one is under load at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report, wrk
from .delivery_load import SLACK_S, Deliveries
from .delivery_report import (
    ALONE,
    DURABLE,
    FROZEN,
    MEMORY,
    Loads,
    Turn,
    Turns,
    deliveries_table,
    figures,
    verdict,
    waiting_table,
)
from .disk import describe_disk, folder_bytes
from .harness import HOST, BenchmarkError, Server, is_ready, run, serving_source
from .noise import watch_others
from .peer_frozen import frozen_python, frozen_versions, serving_frozen
from .peers import InstallError, default_cache

_STATES = {DURABLE: "ogpu-state", MEMORY: ":memory:"}
_SOURCE = "echo_service.py"
_WARM_UP_S = 1
_EXIT_SLACK_S = 10


@dataclass(frozen=True)
class Candidate:
    """Where tasks are posted to; for the limit of load and sink, the sink itself."""

    name: str
    port: int
    path: str = "/run/echo/"
    server: Server | None = None


def main() -> None:
    options = _options()
    facts = report.environment()
    facts["disk"] = describe_disk()
    with ExitStack() as stack:
        sink = stack.enter_context(socket.create_server((HOST, 0), backlog=1024))
        candidates = _start_all(stack, sink.getsockname()[1], options.cache, facts)
        waiting = _start_waiting(stack)
        turns, loads = _measure(candidates, waiting, sink, options)
        facts["journal_bytes"] = {
            c.name: folder_bytes(c.server.folder / _STATES[c.name])
            for c in candidates
            if c.server is not None and c.name in _STATES
        }
    disk = facts["disk"]
    print(
        f"\n{report.describe(facts)}; state on {disk['filesystem']}, where an fdatasync of 4 KiB "
        f"takes {disk['fdatasync_us']} µs; {options.rounds} rounds of {options.seconds} s\n"
    )
    print(deliveries_table(turns, options.concurrency))
    if loads:
        print(f"\n{waiting_table(loads, options.concurrency)}")
    print(f"\n{verdict(turns, loads, facts)}")
    given = {name: getattr(options, name) for name in ("rounds", "seconds", "concurrency")}
    content = {"benchmark": "deliveries", "environment": facts, "options": given}
    report.write_json(options.json, content | figures(turns, loads))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deliveries", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server")
    parser.add_argument("--seconds", type=int, default=5, help="length of each load")
    parser.add_argument(
        "--concurrency", type=int, default=32, help="tasks that are on their way at once"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--cache", type=Path, default=default_cache(), help="where the frozen module is kept"
    )
    return parser.parse_args()


def _start_all(
    stack: ExitStack, sink_port: int, cache: Path, facts: dict[str, Any]
) -> list[Candidate]:
    callback_url = f"http://{HOST}:{sink_port}/results"
    candidates = []
    for name in _STATES:
        server = stack.enter_context(_ours(name, {"CALLBACK_URL": callback_url}))
        candidates.append(Candidate(name, server.port, server=server))
    try:
        python = frozen_python(cache)
    except InstallError as error:
        print(f"Skipped: {FROZEN} cannot be installed here ({error})", file=sys.stderr)
    else:
        server = stack.enter_context(serving_frozen(python, _SOURCE, callback_url))
        candidates.append(Candidate(FROZEN, server.port, server=server))
        facts["versions"].update(frozen_versions(python))
    candidates.append(Candidate(ALONE, sink_port, "/results/"))
    return candidates


def _start_waiting(stack: ExitStack) -> list[wrk.Candidate]:
    """Start ours once more, with nobody to call back, for clients that wait for the answer."""
    if not wrk.is_installed():
        print("Skipped: Prefer: wait, since wrk is not installed", file=sys.stderr)
        return []
    servers = {name: stack.enter_context(_ours(name, {})) for name in _STATES}
    return [
        wrk.checked(wrk.Candidate(name, server, "/run/echo/", True, "wait=30"))
        for name, server in servers.items()
    ]


@contextmanager
def _ours(name: str, environment: dict[str, str]) -> Iterator[Server]:
    with serving_source(_SOURCE, {"OGPU_STATE_DIR": _STATES[name], **environment}) as server:
        server.wait_for(is_ready)
        yield server


def _measure(
    candidates: list[Candidate],
    waiting: list[wrk.Candidate],
    sink: socket.socket,
    options: argparse.Namespace,
) -> tuple[Turns, Loads]:
    turns: Turns = {candidate.name: [] for candidate in candidates}
    loads: Loads = {candidate.name: [] for candidate in waiting}
    for candidate in candidates:
        _deliver(candidate, 0, sink, options.concurrency, _WARM_UP_S)
    for asked in waiting:
        wrk.load(asked, "warm-up", options.concurrency, _WARM_UP_S)
    for number in range(1, options.rounds + 1):
        for candidate in candidates:
            turn = _deliver(candidate, number, sink, options.concurrency, options.seconds)
            turns[candidate.name].append(turn)
            _tell(number, candidate.name, f"{turn.seen.delivered_per_s:.0f} delivered/s", turn)
        for asked in waiting:
            load = wrk.load(asked, f"{number}", options.concurrency, options.seconds)
            loads[asked.name].append(load)
            _tell(number, asked.name, f"{load.requests_per_s:.0f} requests/s", load)
    return turns, loads


def _deliver(
    candidate: Candidate, number: int, sink: socket.socket, concurrency: int, seconds: int
) -> Turn:
    tag = f"{candidate.port}-{number}"  # no other run has these addresses
    command = [sys.executable, "-m", "benchmarks.delivery_load"]
    command += ["--port", str(candidate.port), "--path", candidate.path]
    command += ["--sink", str(sink.fileno()), "--tag", tag]
    command += ["--concurrency", str(concurrency), "--seconds", str(seconds)]
    others_cpus = watch_others(os.getpid())
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        pass_fds=[sink.fileno()],
        timeout=seconds + SLACK_S + _EXIT_SLACK_S,
        check=False,
    )
    if done.returncode:
        log = candidate.server.log_tail() if candidate.server else ""
        raise BenchmarkError(f"{candidate.name}: {done.stderr.strip()}\n{log}")
    return Turn(Deliveries(**json.loads(done.stdout)), others_cpus())


def _tell(number: int, name: str, figure: str, turn: Turn | wrk.Load) -> None:
    print(
        f"round {number}, {name}: {figure}; others used {turn.others_cpus:.2f} CPUs",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run(main)
