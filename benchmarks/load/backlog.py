"""The load and the sink of the case backlog, in a process of their own.

1. N connections post tasks, each the next one when this one was accepted, until there are as many
   as are wanted. Nothing is delivered meanwhile: the handler waits for a gate, which is a file.
2. "accepted" and the seconds that it took go to stdout; then a line is read from stdin, so that who
   started this can look at the server.
3. The gate is opened. When the last task has arrived, once and with its own text, what was seen
   goes to stdout as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import uvloop

from .wire import Book, Client, Task, open_clients, open_sink

LIMIT_S = 120.0  # for each half
_LINGER_S = 1.0  # for what should not come: a second delivery


class _Backlog(Book):
    def __init__(self, tag: str, wanted: int) -> None:
        super().__init__(tag)
        self.all_accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.open_gate_at: float | None = None
        self._wanted = wanted
        self._accepted = self._delivered = 0

    def post_next(self, client: Client) -> None:
        if len(self.tasks) < self._wanted:
            self.post(client)

    def note_accepted(self, task: Task) -> None:
        self._accepted += 1
        if self._accepted == self._wanted:
            self.all_accepted.set_result(None)
        self.post_next(task.client)

    def note_delivered(self, _: Task) -> None:
        if self.open_gate_at is None:
            self.fail("a task was delivered while the gate was shut")
        self._delivered += 1
        if self._delivered == self._wanted:
            self.end()


async def _load(options: argparse.Namespace) -> dict[str, float]:
    book = _Backlog(options.tag, options.tasks)
    sink = await open_sink(book, options.sink)
    clients = await open_clients(book, options.port, options.path, options.concurrency)
    started = time.perf_counter()
    for client in clients:
        book.post_next(client)
    await asyncio.wait(
        {book.all_accepted, book.over}, timeout=LIMIT_S, return_when=asyncio.FIRST_COMPLETED
    )
    if book.over.done():
        await book.over
    if not book.all_accepted.done():
        raise RuntimeError(f"{options.tasks} tasks were not accepted within {LIMIT_S:g} s")
    accept_s = time.perf_counter() - started
    print("accepted", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    book.open_gate_at = time.perf_counter()
    options.gate.touch()
    try:
        await asyncio.wait_for(asyncio.shield(book.over), LIMIT_S)
    except asyncio.TimeoutError:
        raise RuntimeError(book.missing()) from None
    work_off_s = time.perf_counter() - book.open_gate_at
    await asyncio.sleep(_LINGER_S)
    await book.over  # what was wrong meanwhile is raised here
    sink.close()
    return {"accept_s": accept_s, "work_off_s": work_off_s}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load.backlog")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True, help="a task's address is put behind it")
    parser.add_argument("--sink", type=int, required=True, help="descriptor that listens")
    parser.add_argument("--tag", required=True, help="what the run's addresses begin with")
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--gate", type=Path, required=True, help="file that lets handlers go on")
    try:
        seen = uvloop.run(_load(parser.parse_args()))
    except (RuntimeError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
