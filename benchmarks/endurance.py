"""A thousand kills under load, and a hundred thousand tasks: what is left, and what grows.

A. Hung handlers, one after the other, each killed at its deadline, while clients have other tasks
   run by the same two workers. Recovery is the time from the deadline until the slot of the hung
   one has a worker again that takes tasks, seen from outside (GET /workers, asked again and again).
B. Small tasks, as fast as they are answered; memory and descriptors of the front, before and after.

After each: processes, zombies, descriptors, temporary folders. Anything left is an error.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

from . import report
from .candidate import Candidate
from .harness import BenchmarkError, Server, answer, get, is_ready, post, run, serving_source
from .kills import KINDS
from .load.wrk import load

_BODY = {"text": "hello"}
_WAIT = {"prefer": "wait=30"}
_LIMIT_S = 30.0
_ROUND_S = 5
_MIB = 1024 * 1024
_WORKERS = 2


@dataclass(frozen=True)
class Household:
    """What the service has of the system."""

    processes: int
    zombies: int
    front_descriptors: int
    template_descriptors: int
    temp_folders: int
    front_rss_mib: float


def main() -> None:
    options = _options()
    facts = report.environment()
    with tempfile.TemporaryDirectory(prefix="endurance-") as temp:
        variables = {
            "BENCHMARK_TIMEOUT_S": "0.05",
            "OGPU_WORKERS": str(_WORKERS),
            "OGPU_LOG_LEVEL": "ERROR",
            "TMPDIR": temp,
        }
        with serving_source("hang.py", variables) as server:
            server.wait_for(is_ready)
            content = {
                "kills": _kills(server, Path(temp), options.kills),
                "tasks": _tasks(server, Path(temp), options.tasks),
            }
    print(f"{report.describe(facts)}; {_WORKERS} workers, fork")
    report.write_json(options.json, {"benchmark": "endurance", "environment": facts, **content})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="hung handlers")
    parser.add_argument("--tasks", type=int, default=100_000, help="small tasks, at least")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args()


# --- A


def _kills(server: Server, temp: Path, count: int) -> dict[str, object]:
    _wait_whole(server)
    before = _household(server, temp)
    kinds = [kind for kind in KINDS if kind != "stopped"] + ["stopped"]
    recoveries = []
    with _load_beside(server) as innocent, closing(server.connect()) as asking:
        for number in range(count):
            recoveries.append(_kill_once(asking, kinds[number % len(kinds)], number))
            if number % 100 == 99:
                print(f"{number + 1} kills", file=sys.stderr)
    _wait_whole(server)
    after = _household(server, temp)
    _compare(before, after)
    p50, p99 = (report.percentile(recoveries, percent) for percent in (50, 99))
    print(
        f"{count} kills, {len(innocent)} innocent tasks beside them: recovery p50 {p50:.1f} ms, "
        f"p99 {p99:.1f}, max {max(recoveries):.1f}; nothing left\n  {before}\n  {after}"
    )
    return {"recovery_ms": recoveries, "before": asdict(before), "after": asdict(after)}


def _kill_once(asking: http.client.HTTPConnection, kind: str, number: int) -> float:
    post(asking, f"/run/{kind}/hung-{number}", _BODY, _WAIT)
    hung = answer(asking)
    if hung["state"] != "timed_out":
        raise BenchmarkError(f"a hung handler is {hung}")
    worker = hung["worker"]
    limit = time.monotonic() + _LIMIT_S
    while time.monotonic() < limit:
        slot = get(asking, "/workers")["workers"][worker["slot"]]
        if slot["generation"] > worker["generation"] and slot["state"] in ("ready", "busy"):
            deadline = datetime.fromisoformat(hung["deadline"].replace("Z", "+00:00"))
            return (time.time() - deadline.timestamp()) * 1000
    raise BenchmarkError(f"the slot was not filled again within {_LIMIT_S:g} s: {slot}")


@contextmanager
def _load_beside(server: Server) -> Iterator[list[str]]:
    """Run innocent tasks, one after the other, until the end; yield those that were answered."""
    done: list[str] = []
    wrong: list[object] = []
    stop = threading.Event()

    def work() -> None:
        with closing(server.connect()) as connection:
            while not stop.is_set():
                name = f"innocent-{len(done)}"
                post(connection, f"/run/echo/{name}", {"text": name}, _WAIT)
                task = answer(connection)
                if task.get("state") != "succeeded" or task["result"] != {"text": name}:
                    wrong.append(task)
                    return
                done.append(name)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()
    if wrong:
        raise BenchmarkError(f"an innocent task is {wrong[0]}")


# --- B


def _tasks(server: Server, temp: Path, least: int) -> dict[str, object]:
    candidate = Candidate("ogpu-service", server, "/run/echo/", True, "wait=30", found_in="result")
    candidate.wait_until_answered(_BODY, _BODY)
    load(candidate, _BODY, "warm", 16, _ROUND_S)  # pools, caches and the journal's first pages
    before = _household(server, temp)
    done, series = 0, [before.front_rss_mib]
    while done < least:
        done += round(
            load(candidate, _BODY, f"r{len(series)}", 16, _ROUND_S).requests_per_s * _ROUND_S
        )
        series.append(_household(server, temp).front_rss_mib)
    _wait_whole(server)
    after = _household(server, temp)
    _compare(before, after)
    grown = after.front_rss_mib - before.front_rss_mib
    print(f"{done} tasks: the front grew by {grown:+.1f} MiB\n  {before}\n  {after}")
    return {
        "tasks": done,
        "front_rss_mib": series,
        "before": asdict(before),
        "after": asdict(after),
    }


# --- what is left


def _wait_whole(server: Server) -> None:
    with closing(server.connect()) as connection:
        limit = time.monotonic() + _LIMIT_S
        while time.monotonic() < limit:
            if all(s["state"] == "ready" for s in get(connection, "/workers")["workers"]):
                return
            time.sleep(0.01)
    raise BenchmarkError("the pool is not whole again")


def _household(server: Server, temp: Path) -> Household:
    front = psutil.Process(server.process.pid)
    (template,) = front.children()
    everything = [front, *front.children(recursive=True)]
    return Household(
        processes=len(everything),
        zombies=sum(process.status() == psutil.STATUS_ZOMBIE for process in everything),
        front_descriptors=_descriptors(front.pid),
        template_descriptors=_descriptors(template.pid),
        temp_folders=len(list(temp.glob("ogpu-*/*-*"))),
        front_rss_mib=round(front.memory_info().rss / _MIB, 1),
    )


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _compare(before: Household, after: Household) -> None:
    """Raise where something is left; a client's connection may be open on one side and not yet."""
    expected = asdict(before) | {"front_rss_mib": after.front_rss_mib}
    found = asdict(after)
    open_more = found["front_descriptors"] - expected["front_descriptors"]
    expected["front_descriptors"] = found["front_descriptors"]
    if found != expected or open_more > 2:
        raise BenchmarkError(f"something is left:\n  before {before}\n  after  {after}")


if __name__ == "__main__":
    run(main)
