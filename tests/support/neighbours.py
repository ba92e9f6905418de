"""Innocent work beside something bad: it must not notice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import psutil

from .server import Server
from .waiting import wait_until


@dataclass
class Neighbours:
    """What those beside it saw: wrong answers, and how late and how large the front was."""

    wrong: list[object] = field(default_factory=list)
    echoes: int = 0
    slowest_s: float = 0.0
    largest_bytes: int = 0


@contextmanager
def neighbours(
    server: Server, name: str, *, grows_bytes: int = 20 * 2**20, slowest_s: float = 2.0
) -> Iterator[Neighbours]:
    """Run small tasks and ask for /healthz over and over; then look what became of the pool.

    The handler ``echo`` is asked; there has to be a worker that is free for it. The front may grow
    by ``grows_bytes`` meanwhile, and answer /healthz in ``slowest_s``.
    """
    front = psutil.Process(server.process.pid)
    before = front.memory_info().rss
    seen = Neighbours()
    over = threading.Event()
    thread = threading.Thread(target=_work, args=(server, name, front, seen, over))
    thread.start()
    try:
        yield seen
        wait_until(lambda: seen.echoes > 2, "innocent tasks succeed")
    finally:
        over.set()
        thread.join()
    assert seen.wrong == []
    assert seen.slowest_s < slowest_s, f"/healthz took {seen.slowest_s:.2f} s ({name})"
    grown = seen.largest_bytes - before
    assert grown < grows_bytes, f"the front has grown by {grown:,} bytes ({name})"
    wait_until(lambda: is_whole(server), f"the pool is whole after {name}")


def is_whole(server: Server) -> bool:
    """Tell whether each slot has a worker that takes tasks, or runs one."""
    return all(slot["state"] in ("ready", "busy") for slot in server.workers()["workers"])


def _work(
    server: Server, name: str, front: psutil.Process, seen: Neighbours, over: threading.Event
) -> None:
    wait = {"Prefer": "wait=20"}
    with httpx.Client(base_url=server.url, timeout=30) as client:
        while not over.wait(0.002):
            try:
                asked = time.monotonic()
                client.get("/healthz").raise_for_status()
                seen.slowest_s = max(seen.slowest_s, time.monotonic() - asked)
                text = f"{name} {seen.echoes}"
                body = {"text": text}
                task = client.post("/run/echo/echo", json=body, headers=wait).json()
                if task.get("state") != "succeeded" or task["result"]["text"] != text:
                    seen.wrong.append(task)
                seen.echoes += 1
            except httpx.HTTPError as error:
                seen.wrong.append(error)
                return
            seen.largest_bytes = max(seen.largest_bytes, front.memory_info().rss)
