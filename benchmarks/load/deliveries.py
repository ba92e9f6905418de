"""The load and the sink of the case delivery, in a process of their own.

Each of N connections posts a task, and the next one only when this one was accepted and has
arrived at the sink: never more than N tasks are on their way. When the time is over, what is on its
way is waited for. The one line on stdout is what was seen, as JSON.

The sink is handed over as a socket that listens already, and outlives this process: a delivery that
comes too late is seen by the next run, which knows no such task.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass

import uvloop

from ..report import percentile
from .wire import Book, Client, Task, open_clients, open_sink

SLACK_S = 60.0  # for what is on its way when the time is over
_LINGER_S = 1.0  # for what should not come: a second delivery


@dataclass(frozen=True)
class Deliveries:
    """What one run has seen."""

    tasks: int
    delivered_per_s: float
    p50_ms: float  # accepted → delivered
    p99_ms: float
    accepted_p50_ms: float  # posted → accepted
    load_cpus: float  # what load and sink used themselves


class _ClosedLoop(Book):
    def __init__(self, tag: str, seconds: float) -> None:
        super().__init__(tag)
        self._until = time.perf_counter() + seconds
        self._on_their_way = 0

    def post_next(self, client: Client) -> None:
        if time.perf_counter() < self._until:
            self._on_their_way += 1
            self.post(client)
        elif not self._on_their_way:
            self.end()

    def note_accepted(self, task: Task) -> None:
        if task.delivered_at is not None:
            self._end_of(task)

    def note_delivered(self, task: Task) -> None:
        if task.accepted_at is not None:
            self._end_of(task)

    def _end_of(self, task: Task) -> None:
        self._on_their_way -= 1
        self.post_next(task.client)


async def _load(options: argparse.Namespace) -> Deliveries:
    book = _ClosedLoop(options.tag, options.seconds)
    sink = await open_sink(book, options.sink)
    clients = await open_clients(book, options.port, options.path, options.concurrency)
    cpu_s = time.process_time()
    for client in clients:
        book.post_next(client)
    try:
        await asyncio.wait_for(asyncio.shield(book.over), options.seconds + SLACK_S)
    except asyncio.TimeoutError:
        raise RuntimeError(book.missing()) from None
    cpu_s = time.process_time() - cpu_s
    await asyncio.sleep(_LINGER_S)
    await book.over  # what was wrong meanwhile is raised here
    sink.close()
    return _sum_up(list(book.tasks.values()), cpu_s)


def _sum_up(tasks: list[Task], cpu_s: float) -> Deliveries:
    times = [
        (task.posted_at, task.accepted_at, task.delivered_at)
        for task in tasks
        if task.accepted_at is not None and task.delivered_at is not None
    ]
    assert len(times) == len(tasks) > 0
    duration_s = max(delivered for _, _, delivered in times) - times[0][0]
    # A delivery may be read before the 202 that was sent before it.
    delivery_ms = [max(0.0, delivered - accepted) * 1000 for _, accepted, delivered in times]
    return Deliveries(
        tasks=len(times),
        delivered_per_s=len(times) / duration_s,
        p50_ms=percentile(delivery_ms, 50),
        p99_ms=percentile(delivery_ms, 99),
        accepted_p50_ms=percentile([(a - posted) * 1000 for posted, a, _ in times], 50),
        load_cpus=cpu_s / duration_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load.deliveries")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True, help="a task's address is put behind it")
    parser.add_argument("--sink", type=int, required=True, help="descriptor that listens")
    parser.add_argument("--tag", required=True, help="what the run's addresses begin with")
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    try:
        seen = asdict(uvloop.run(_load(parser.parse_args())))
    except (RuntimeError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
