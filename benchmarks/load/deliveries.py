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
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any, cast

import httptools
import uvloop

from ..harness import HOST
from ..report import percentile

SLACK_S = 60.0  # for what is on its way when the time is over
_LINGER_S = 1.0  # for what should not come: a second delivery
_BACKLOG = 1024
_SINK_OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


@dataclass(frozen=True)
class Deliveries:
    """What one run has seen."""

    tasks: int
    delivered_per_s: float
    p50_ms: float  # accepted → delivered
    p99_ms: float
    accepted_p50_ms: float  # posted → accepted
    load_cpus: float  # what load and sink used themselves


@dataclass
class _Task:
    client: _Client
    text: str
    posted_at: float
    accepted_at: float | None = None
    delivered_at: float | None = None


class _Book:
    """Every task of a run, and the first thing that went wrong."""

    def __init__(self, tag: str, until: float) -> None:
        self.tasks: dict[str, _Task] = {}
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tag = tag
        self._until = until
        self._on_their_way = 0

    def post_next(self, client: _Client) -> None:
        now = time.perf_counter()
        if now < self._until:
            address = f"{self._tag}-{len(self.tasks)}"
            task = _Task(client, f"hello {address}", now)
            self.tasks[address] = task
            self._on_their_way += 1
            client.post(address, json.dumps({"text": task.text}))
        elif not self._on_their_way and not self.over.done():
            self.over.set_result(None)

    def accepted(self, address: str) -> None:
        task = self.tasks[address]
        task.accepted_at = time.perf_counter()
        self._end_if_both(task)

    def delivered(self, address: str, body: bytes) -> None:
        task = self.tasks.get(address)
        if task is None:
            self.fail(f"{address} was delivered, which this run has not posted")
        elif task.delivered_at is not None:
            self.fail(f"{address} was delivered twice")
        elif not _says(body, task.text):
            self.fail(f"{address} was delivered as {body[:200]!r}")
        else:
            task.delivered_at = time.perf_counter()
            self._end_if_both(task)

    def fail(self, message: str) -> None:
        if not self.over.done():
            self.over.set_exception(RuntimeError(message))
        elif self.over.exception() is None:  # after the last delivery
            self.over = asyncio.get_running_loop().create_future()
            self.over.set_exception(RuntimeError(message))

    def missing(self) -> str:
        """Say how many tasks have not arrived, and which is the first of them."""
        lost = [address for address, task in self.tasks.items() if task.delivered_at is None]
        return f"{len(lost)} of {len(self.tasks)} tasks were not delivered, {lost[:1]} the first"

    def _end_if_both(self, task: _Task) -> None:
        if task.accepted_at is not None and task.delivered_at is not None:
            self._on_their_way -= 1
            self.post_next(task.client)


def _says(body: bytes, text: str) -> bool:
    try:
        return bool(json.loads(body) == {"text": text})
    except ValueError:
        return False


class _Client(asyncio.Protocol):
    """One connection: posts a task, and reads what is answered."""

    def __init__(self, book: _Book, port: int, path: str) -> None:
        self._book = book
        self._head = f"POST {path}%s HTTP/1.1\r\nhost: {HOST}:{port}\r\n"
        self._head += "content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
        self._parser = httptools.HttpResponseParser(self)
        self._address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _: Exception | None) -> None:
        self._book.fail("the service has closed a connection of the load")

    def post(self, address: str, body: str) -> None:
        self._address = address
        self._transport.write((self._head % (address, len(body), body)).encode())

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status in (200, 202):  # 200: the sink itself, when its limit is measured
            self._book.accepted(self._address)
        else:
            self._book.fail(f"{self._address} was answered {status}")


class _Sink(asyncio.Protocol):
    """One connection of the service: takes results, and answers 200 with no body."""

    def __init__(self, book: _Book) -> None:
        self._book = book
        self._parser = httptools.HttpRequestParser(self)
        self._url = self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._transport.write(_SINK_OK)
        self._book.delivered(self._url.rpartition(b"/")[2].decode(), self._body)
        if not self._parser.should_keep_alive():
            self._transport.close()


async def _load(options: argparse.Namespace) -> Deliveries:
    loop = asyncio.get_running_loop()
    listener = socket.socket(fileno=options.sink)
    book = _Book(options.tag, time.perf_counter() + options.seconds)
    sink = await loop.create_server(lambda: _Sink(book), sock=listener, backlog=_BACKLOG)
    clients = [
        (
            await loop.create_connection(
                lambda: _Client(book, options.port, options.path), HOST, options.port
            )
        )[1]
        for _ in range(options.concurrency)
    ]
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


def _sum_up(tasks: list[_Task], cpu_s: float) -> Deliveries:
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
    seen: dict[str, Any]
    try:
        seen = asdict(uvloop.run(_load(parser.parse_args())))
    except (RuntimeError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
