"""A seeded mix of everything in the table, all at once, and the judgement of what came of it.

1. Clients send innocent and guilty tasks, cancel some, and leave while some are answered.
2. Meanwhile somebody strikes at workers, template, front and receiver, at random moments.
3. ``complaints``: each task has ended as it may. A worker that was struck, or in which an earlier
   task has left a thread that acts later, may take an innocent task with it: its pid is a *hit*.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
from typing_extensions import Self

from support.fronts import pause

from .faults import (
    DIED,
    ROWS,
    SUCCEEDED,
    TEMPLATES_END,
    TIMED_OUT,
    Ends,
    Fault,
    Inside,
    Moment,
    Outside,
    Row,
)  # fmt: skip
from .harness import end_of
from .moments import SIGNALS
from .stage import Stage, stop

# What may become of any task: its worker was struck, or it was cancelled.
_STRUCK: Ends = DIED | SUCCEEDED | TIMED_OUT | {"failed/interrupted"}
_GUILTY = tuple(
    row
    for row in ROWS
    if row.moment in (Moment.IN_HANDLER, Moment.WHILE_ANSWERING) and isinstance(row.fault, Inside)
)
_INIT_FAULTS = tuple(
    row.fault for row in ROWS
    if row.moment is Moment.IN_INIT and isinstance(row.fault, Inside)
)  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """A task that a client has sent; without a row it is innocent."""

    address: str
    row: Row | None
    cancelled: bool
    accepted: bool


class Clients:
    """They send tasks until it is over."""

    def __init__(self, stage: Stage, seed: int, count: int = 3) -> None:
        self.sent: list[Sent] = []
        self.refused: list[str] = []
        self._stage = stage
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._be_one, args=(n, random.Random(seed * 10 + n)))
            for n in range(count)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _be_one(self, number: int, rng: random.Random) -> None:
        count = 0
        while not self._over.wait(rng.uniform(0, 0.3)):
            count += 1
            row = rng.choice(_GUILTY) if rng.random() < 0.2 else None
            name = row.id if row else "innocent"
            try:
                self.sent.append(self._send(f"{name}-c{number}-{count}", row, rng))
            except Exception as error:  # noqa: BLE001 - is judged with the rest
                self.refused.append(f"{name}: {error!r}")

    def _send(self, address: str, row: Row | None, rng: random.Random) -> Sent:
        function, body = "echo", {"text": address}
        if row is not None:
            large = 2**20 if row.moment is Moment.WHILE_ANSWERING else 0
            moment = {"moment": row.moment.value, "fault": row.fault.value, "size_bytes": large}
            function, body = row.function, body | moment
            self._stage.tell_go(address)
        leaves, cancels = rng.random() < 0.1, rng.random() < 0.1
        headers = "prefer: wait=60\r\n" if leaves else ""
        with self._stage.send_raw("POST", f"/run/{function}/{address}", body, headers) as client:
            if not leaves and (status := client.read_status()) != 202:
                self.refused.append(f"{address}: {status}")
        if cancels:
            with self._stage.send_raw("DELETE", f"/tasks/{address}") as client:
                client.read_status()
        return Sent(address, row, cancels, not leaves)


class Striker:
    """Somebody who is everywhere, and leaves nothing alone."""

    def __init__(self, stage: Stage, rng: random.Random) -> None:
        self.hits: set[int] = set()
        self.strikes: Counter[str] = Counter()
        self._stage, self._rng = stage, rng
        self._ways = [
            *[(4, fault) for fault in SIGNALS],
            (1, Outside.SIGSTOP), (2, Outside.FRONT_PAUSED), (2, Outside.RECEIVER_RESETS),
            (2, Outside.TEMPLATE_PAUSED), (4, Moment.IN_INIT),
            *[(1, fault) for fault in TEMPLATES_END if isinstance(fault, Outside)],
        ]  # fmt: skip

    def strike(self) -> None:
        template = self._stage.find_template()
        ready = any(slot["state"] in ("ready", "busy") for slot in self._stage.pool())
        # Where nothing ever gets ready there is nothing to see, so that is struck now and then.
        if template is None or not (ready or self._rng.random() < 0.1):
            return
        weights, ways = zip(*self._ways, strict=True)
        way: Fault | Moment = self._rng.choices(ways, weights)[0]
        self.strikes[way.value] += 1
        with contextlib.suppress(ProcessLookupError):
            if way in SIGNALS or way is Outside.SIGSTOP:
                self._strike_worker(template, SIGNALS.get(way, signal.SIGSTOP))
            elif way is Moment.IN_INIT:
                fault = self._rng.choice(_INIT_FAULTS)
                (self._stage.place / "init" / fault.value).touch()
            elif way is Outside.RECEIVER_RESETS:
                self._stage.sink.answers = [*self._rng.choices([0, 500, 200], k=4), 200]
            elif way in (Outside.FRONT_PAUSED, Outside.TEMPLATE_PAUSED):
                paused = template if way is Outside.TEMPLATE_PAUSED else self._stage.front.pid
                with self._stage.paused(paused):
                    if paused == template:  # seen so twice it is killed, and its workers with it
                        self.hits |= set(self._workers(template))
                    pause(self._rng.uniform(0, 0.6))
            else:
                self._end_template(template, way)

    def _strike_worker(self, template: int, number: int) -> None:
        workers = list(self._workers(template))
        if workers:
            pid = self._rng.choice(workers)
            self.hits.add(pid)
            os.kill(pid, number)

    def _end_template(self, template: int, way: object) -> None:
        if way is Outside.TEMPLATE_SIGSTOP:
            stop(template)
        self.hits |= set(self._workers(template))
        if way is Outside.TEMPLATE_SIGKILL:
            os.kill(template, signal.SIGKILL)

    def _workers(self, template: int) -> Iterator[int]:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield from (child.pid for child in psutil.Process(template).children())


# --- what came of it


def complaints(stage: Stage, sent: list[Sent], hits: set[int]) -> list[str]:
    """Return all that is wrong."""
    hits = hits | {int(line) for line in (stage.place / "hits").read_text().split()}
    deliveries: dict[str, list[Any]] = {}
    for delivery in list(stage.sink.deliveries):
        deliveries.setdefault(delivery.address, []).append(delivery)
    found = []
    for one in sent:
        response = stage.server.http.get(f"/tasks/{one.address}")
        if response.status_code == 404 and not one.accepted:
            continue
        task = response.json()
        got = deliveries.get(one.address, [])
        found += [f"{one}: {wrong}; {task}; {got}" for wrong in _judge(one, task, got, hits)]
    return found


def _judge(one: Sent, task: dict[str, Any], got: list[Any], hits: set[int]) -> Iterator[str]:
    if "state" not in task:
        yield "accepted, and not known"
        return
    end = end_of(task)
    if end not in _ends(one, task, hits):
        yield "it may not end so"
    if end != "succeeded":
        if got:
            yield "something was delivered"
        return
    if task["result"]["text"] != one.address:
        yield "another result"
    if not got or task["callback"]["state"] != "delivered":
        yield "not delivered"
    if any(d.json["text"] != one.address for d in got):
        yield "another result was delivered"
    if len({d.headers["webhook-id"] for d in got}) > 1:
        yield "delivered as several tasks"


def _ends(one: Sent, task: dict[str, Any], hits: set[int]) -> Ends:
    ends = SUCCEEDED if one.row is None else one.row.ends
    if one.row is not None and one.row.moment is Moment.WHILE_ANSWERING:
        ends |= SUCCEEDED  # the answer was quicker
    if one.cancelled:
        ends |= {"cancelled"}
    if task["worker"] and task["worker"]["pid"] in hits:
        ends |= _STRUCK
    return ends
