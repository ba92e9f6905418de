"""Plays one row of the table, with innocent load beside it, and asserts what must be true then.

1. Count what the server has: descriptors, memory.
2. Play the row (moments.py); innocent tasks run meanwhile.
3. Each task has ended, once, as it may; the innocent ones with their own text, delivered once.
4. The pool is whole, and nothing is there that was not there before.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from support.waiting import wait_until

from .census import check_nothing_left, settled_census
from .faults import (
    DIED,
    SUCCEEDED,
    TEMPLATE_LOST,
    TEMPLATES_END,
    Ends,
    Inside,
    Moment,
    Outside,
    Row,
)
from .moments import PLAYS, Play
from .stage import Stage, post

_INNOCENTS = 8
_CLIENTS = 2
_numbers = itertools.count()

# What these kill is not the guilty worker alone.
_COLLATERAL: dict[object, Ends] = {
    Inside.KILL_SIBLING: DIED | SUCCEEDED,
    **dict.fromkeys(TEMPLATES_END, TEMPLATE_LOST),
}


class Innocents:
    """Clients that send echo tasks, from when they are told to begin."""

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage, self._name = stage, name
        self._clients = ThreadPoolExecutor(_CLIENTS)
        self._sent: list[Future[dict[str, Any]]] = []

    def begin(self) -> None:
        self._sent = [
            self._clients.submit(post, self._stage.port, "echo", address, {"text": address})
            for address in (f"{self._name}-innocent-{n}" for n in range(_INNOCENTS))
        ]

    def finish(self) -> list[dict[str, Any]]:
        """Return the tasks as their clients were shown them."""
        try:
            return [sent.result(60) for sent in self._sent]
        finally:
            self._clients.shutdown()


def play_row(stage: Stage, row: Row) -> None:
    """Play it, and assert the invariants."""
    address = f"{row.id}-{next(_numbers)}"
    before, template = settled_census(stage), stage.template
    stage.sink.deliveries.clear()
    innocents = Innocents(stage, address)
    with contextlib.ExitStack() as clients:
        play = Play(stage, row, address, innocents.begin, clients)
        try:
            PLAYS[row.moment](play)
        finally:
            shown = innocents.finish()
        guilty = [stage.wait_end(one) for one in play.guilty]
    assert len(shown) == _INNOCENTS
    for task in guilty:
        assert end_of(task) in row.ends, task
        check_evidence(row, task)
    for task in shown:
        assert end_of(task) in _COLLATERAL.get(row.fault, SUCCEEDED), task
    if row.fault in TEMPLATES_END:
        wait_until(lambda: stage.template != template, "there is another template")
    check_nothing_left(stage, before)
    check_ends_last(stage, [*guilty, *shown])
    check_results(stage, [*guilty, *shown], once=row.fault is not Outside.RECEIVER_RESETS)


def end_of(task: dict[str, Any]) -> str:
    """Return the state, and the reason of what has failed."""
    state: str = task["state"]
    return f"failed/{task['error']['reason']}" if state == "failed" else state


# --- the invariants


def check_evidence(row: Row, task: dict[str, Any]) -> None:
    """A death by a signal says by which."""
    name = row.fault.name
    if row.moment is Moment.IN_HANDLER and row.ends == DIED and name.startswith("SIG"):
        assert task["error"]["signal"] == signal.Signals[name], task


def check_ends_last(stage: Stage, shown: list[dict[str, Any]]) -> None:
    """What was shown as a task's end is what is shown later, and nothing is under way."""
    for task in shown:
        now = stage.server.task(task["task_address"])
        for key in ("state", "attempt", "finished_at", "error", "result"):
            assert now[key] == task[key], (key, task, now)
    for state in ("queued", "running"):
        assert stage.server.http.get("/tasks", params={"state": state}).json()["tasks"] == []
    assert stage.server.http.get("/tasks", params={"limit": 20}).status_code == 200


def check_results(stage: Stage, shown: list[dict[str, Any]], *, once: bool) -> None:
    """Each result says what its task's input said, and was delivered, once."""
    wanted = {task["task_address"] for task in shown if task["state"] == "succeeded"}
    wait_until(
        lambda: all(stage.server.task(a)["callback"]["state"] == "delivered" for a in wanted),
        "every result is delivered",
    )
    for task in shown:
        if task["state"] == "succeeded":
            assert task["result"]["text"] == task["task_address"], task
    deliveries = [d for d in list(stage.sink.deliveries) if d.address in wanted]
    times = Counter(d.address for d in deliveries)
    assert set(times) == wanted
    assert all(d.json["text"] == d.address for d in deliveries)
    assert len({d.headers["webhook-id"] for d in deliveries}) == len(wanted)
    if once:
        assert set(times.values()) <= {1}, times
