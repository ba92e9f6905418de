"""From the deadline of a hung handler to its process being gone, and to the next task's result.

A. deadline → gone: a pidfd on the worker, opened here and polled, says that the process has ended.
B. deadline → next result: a task that was queued while the handler hung has been run by the
   replacement, and its answer is here.

The deadline is the task's own, off the record; it is wall-clock time, and so are the other ends.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import os
import select
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from . import report
from .harness import BenchmarkError, Server, answer, get, is_ready, post, run, serving_source

KINDS = {
    "sleep_loop": "time.sleep in a loop",
    "busy_loop": "while True: pass",
    "sum_in_c": "sum(range(10**14)), GIL held",
    "sleep_in_c": "libc sleep, GIL held",
    "regex": "catastrophic regex, GIL held",
    "ignore_sigterm": "SIGTERM ignored",
    "stopped": "SIGSTOP to itself",
}
_LIMIT_S = 30.0
_POLL_S = 0.002
_BODY = {"text": "hello"}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Kill:
    """One hung handler, and what followed its deadline (milliseconds)."""

    gone_ms: float
    next_ms: float


def main() -> None:
    options = _options()
    facts = report.environment()
    method = "spawn" if options.imported == "tensorflow" else "fork"
    variables = {"BENCHMARK_TIMEOUT_S": str(options.timeout), "OGPU_START_METHOD": method}
    if options.imported:
        variables["BENCHMARK_IMPORT"] = options.imported
    with serving_source("hang.py", variables) as server:
        server.wait_for(is_ready)
        kills = {kind: _repeat(server, kind, options) for kind in options.kinds}
    imported = f"{options.imported} imported" if options.imported else "no torch"
    print(
        f"\n{report.describe(facts)}; {options.repeat} of each kind, "
        f"timeout {options.timeout:g} s, {method}, {imported}"
        + (f", {options.pause:g} s before each\n" if options.pause else "\n")
    )
    print(_table(kills))
    content = {
        "benchmark": "kills",
        "environment": facts,
        "options": {
            name: getattr(options, name) for name in ("repeat", "timeout", "imported", "pause")
        },
        "kills": {kind: [asdict(kill) for kill in many] for kind, many in kills.items()},
    }
    report.write_json(options.json, content)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--repeat", type=int, default=50, help="hung handlers of each kind")
    parser.add_argument("--timeout", type=float, default=0.2, help="seconds until the deadline")
    imported = parser.add_mutually_exclusive_group()
    for name, method in (("torch", "fork"), ("tensorflow", "spawn")):
        imported.add_argument(
            f"--{name}",
            dest="imported",
            action="store_const",
            const=name,
            help=f"the source imports {name}, too ({method})",
        )
    parser.add_argument(
        "--pause",
        type=float,
        default=0,
        help="seconds before each of them (spawn: a standby interpreter has to import the source)",
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


def _repeat(server: Server, kind: str, options: argparse.Namespace) -> list[Kill]:
    kills = []
    for _ in range(options.repeat):
        time.sleep(options.pause)
        kills.append(kill_once(server, kind))
    gone = statistics.median(kill.gone_ms for kill in kills)
    next_result = statistics.median(kill.next_ms for kill in kills)
    print(f"{kind}: gone {gone:.2f} ms, next {next_result:.2f} ms (medians)", file=sys.stderr)
    return kills


def kill_once(server: Server, kind: str) -> Kill:
    """Have a handler hang, with a task queued behind it; wait for the end of both."""
    number = next(_numbers)
    asking, waiting = server.connect(), server.connect()
    try:
        pid = ready_worker(asking)
        with _pidfd_of(pid) as pidfd:
            post(asking, f"/run/{kind}/hung-{number}", _BODY)
            answer(asking)
            post(waiting, f"/run/echo/next-{number}", _BODY, {"prefer": "wait=30"})
            gone_at, next_at = _when_readable(pidfd, waiting.sock.fileno())
        following = answer(waiting)
        asking.close()  # the server has, if it was idle for five seconds; it is opened again
        hung = get(asking, f"/tasks/hung-{number}")
    finally:
        asking.close()
        waiting.close()
    if hung["state"] != "timed_out" or hung["worker"]["pid"] != pid:
        raise BenchmarkError(f"worker {pid} was to hang, and the record says {hung}")
    if following["state"] != "succeeded" or following["worker"]["pid"] == pid:
        raise BenchmarkError(f"the next task did not succeed in another worker: {following}")
    deadline = datetime.fromisoformat(hung["deadline"].replace("Z", "+00:00")).timestamp()
    return Kill((gone_at - deadline) * 1000, (next_at - deadline) * 1000)


def ready_worker(connection: http.client.HTTPConnection) -> int:
    """Wait until the one worker is idle; return its pid."""
    limit = time.monotonic() + _LIMIT_S
    while time.monotonic() < limit:
        (slot,) = get(connection, "/workers")["workers"]
        if slot["state"] == "ready":
            return int(slot["pid"])
        time.sleep(_POLL_S)
    raise BenchmarkError(f"no worker was ready within {_LIMIT_S:g} s: {slot}")


@contextmanager
def _pidfd_of(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _when_readable(*descriptors: int) -> list[float]:
    """Return the time (of day) at which each descriptor became readable."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    seen: dict[int, float] = {}
    limit = time.monotonic() + _LIMIT_S
    while len(seen) < len(descriptors) and (left_s := limit - time.monotonic()) > 0:
        found = poll.poll(left_s * 1000)
        now = time.time()
        for descriptor, _ in found:
            seen[descriptor] = now
            poll.unregister(descriptor)
    if len(seen) < len(descriptors):
        gone = "gone" if descriptors[0] in seen else "still there"
        raise BenchmarkError(
            f"{_LIMIT_S:g} s after it was started: the worker is {gone}, "
            f"{len(seen)} of {len(descriptors)} events came"
        )
    return [seen[descriptor] for descriptor in descriptors]


def _table(kills: dict[str, list[Kill]]) -> str:
    rows = [_row(KINDS[kind], many) for kind, many in kills.items()]
    everything = [kill for many in kills.values() for kill in many]
    rows.append(_row(f"all ({len(everything)})", everything))
    header = ["ms after the deadline", "gone p50", "p99", "max", "next result p50", "p99", "max"]
    return report.table(header, rows)


def _row(name: str, kills: list[Kill]) -> list[str]:
    row = [name]
    for values in ([kill.gone_ms for kill in kills], [kill.next_ms for kill in kills]):
        row += [f"{report.percentile(values, percent):.2f}" for percent in (50, 99, 100)]
    return row


if __name__ == "__main__":
    run(main)
