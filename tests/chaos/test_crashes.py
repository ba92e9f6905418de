"""Accepted means kept: crashes of every part, at any moment, and what must be true afterwards.

The moments are random. A failure prints its seed; CHAOS_SEED=… makes the same choices again (the
processes' own timing is never the same).
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import sqlite3
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from conftest import StartServer
from support.crash_load import Load, complaints, read_ledger, settle
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until

_TEMPLATE = re.compile(r"template: pid (\d+)")


@pytest.fixture
def seed() -> int:
    number = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={number}")  # pytest shows it with a failure
    return number


class Fronts:
    """Fronts on one folder, one after the other, with the ledger source or another one."""

    def __init__(self, start_server: StartServer, tmp_path: Path, **settings: object) -> None:
        self.ledger = tmp_path / "ledger"
        self.ledger.touch()
        self.state_dir = tmp_path / "state"
        self._start_server = start_server
        self._settings = {
            "OGPU_STATE_DIR": self.state_dir, "LEDGER": self.ledger, "OGPU_WORKERS": 2,
            "OGPU_MAX_ATTEMPTS": 100, "OGPU_QUEUE_SIZE": 150, **settings,
        }  # fmt: skip

    def start(self, source: str = "ledger.py", *, wait: bool = True, **settings: object) -> Server:
        return self._start_server(source, wait=wait, **(self._settings | settings))

    def runs(self) -> dict[str, list[int]]:
        """Return the attempts of each address."""
        return {
            address: [attempt for attempt, _ in runs]
            for address, runs in read_ledger(self.ledger).items()
        }

    def rows(self, columns: str, table: str = "tasks") -> list[Any]:
        """Read the journal, which no front has open now."""
        with closing(sqlite3.connect(self.state_dir / "journal.db")) as journal:
            return journal.execute(f"SELECT {columns} FROM {table} ORDER BY number").fetchall()


def pause(seconds: float) -> None:
    """Let a random moment come. Nothing is waited for here: the moment is what is tested."""
    time.sleep(seconds)


def crash(server: Server) -> None:
    server.process.kill()
    assert server.wait_exit() == -signal.SIGKILL, server.log


# --- the front, the template and workers are killed at random moments


def kill_at_some_moment(server: Server, load: Load, rng: random.Random, start_s: float) -> str:
    """Kill a front that has just been started; return when that was."""
    when = rng.choices(["starting", "under load", "draining"], [15, 20, 15])[0]
    if when == "starting":
        pause(rng.uniform(0, start_s))
        crash(server)
        return when
    load.aim(server.wait_listening().url)
    pause(rng.uniform(0, 0.6))
    if when == "draining":
        server.process.terminate()
        pause(rng.uniform(0, 0.4))
        if server.process.poll() is not None:  # it was quicker
            assert server.process.returncode == 0, server.log
            return "drained"
    crash(server)
    return when


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bind", ["ready", "early"])
def test_what_was_accepted_is_kept_over_25_kills_of_the_front(
    start_server: StartServer, sink: Sink, tmp_path: Path, seed: int, bind: str
) -> None:
    """Each 202 has ended, once, as it had to; each result was delivered; nothing ran after its end.

    While it starts, before its port is open, under load and in a drain the front is killed, with
    clients that go on posting, and a receiver that refuses now and then.
    """
    rng = random.Random(seed)
    sink.answers = [*rng.choices([200, 500, 0], [85, 10, 5], k=3000), 200]
    fronts = Fronts(
        start_server, tmp_path, CALLBACK_URL=sink.url, OGPU_DRAIN_TIMEOUT=0.2, OGPU_BIND=bind
    )
    started = time.monotonic()
    server = fronts.start()
    start_s = time.monotonic() - started
    crash(server)
    kills = Counter(["under load"])
    with Load(seed) as load:
        while kills.total() - kills["drained"] < 25:
            server = fronts.start(wait=False)
            kills[kill_at_some_moment(server, load, rng, start_s)] += 1
            load.aim(None)
    sink.answers = [200]
    last = fronts.start()
    settle(last)
    wrong = complaints(last, load, fronts.ledger, sink)
    assert not wrong, "\n".join(wrong)
    assert last.stop() == 0
    # That it was a test: enough was accepted, in all its kinds, and interrupted.
    print(kills, Counter(s.function for s in load.sent if s.is_accepted))
    assert sum(s.is_accepted for s in load.sent) > 100
    assert sum(attempts[-1] > 1 for attempts in fronts.runs().values()) > 5
    assert fronts.rows("number", "inputs") == []  # what is over is not kept for ever


def kill_a_worker(server: Server, template: int, rng: random.Random) -> int | None:
    """Kill a worker, a busy one where there is one; return its pid."""
    slots = [slot for slot in server.workers()["workers"] if slot["pid"]]
    busy = [slot for slot in slots if slot["state"] == "busy"]
    if slots:
        with suppress(psutil.NoSuchProcess):
            worker = psutil.Process(rng.choice(busy or slots)["pid"])
            if worker.ppid() == template:  # and not a stranger who has got that pid meanwhile
                worker.kill()
                return worker.pid
    return None


def template_of(server: Server) -> int:
    match = _TEMPLATE.search(server.log)
    assert match is not None
    return int(match[1])


@pytest.mark.timeout(300)
def test_what_was_accepted_is_kept_whatever_is_killed(
    start_server: StartServer, sink: Sink, tmp_path: Path, seed: int
) -> None:
    """The template's death ends the service (exit code 4), a worker's death its task alone.

    So a task may end as worker_died if it was on a worker that was killed, and only then. Each
    failure is delivered, too.
    """
    rng = random.Random(seed)
    sink.answers = [*rng.choices([200, 500, 0], [85, 10, 5], k=3000), 200]
    fronts = Fronts(
        start_server, tmp_path, CALLBACK_URL=sink.url, OGPU_FAILURE_CALLBACK_URL=sink.url
    )
    killed: list[int] = []
    with Load(seed) as load:
        for number in range(12):
            server = fronts.start(wait=False)
            if number % 6 == 5:  # the template dies while the first worker starts
                server.wait_log("template: pid")
                pause(rng.uniform(0, 0.3))
            else:
                load.aim(server.wait_listening().url)
                for _ in range(rng.randrange(4)):
                    pause(rng.uniform(0, 0.4))
                    killed += filter(None, [kill_a_worker(server, template_of(server), rng)])
                pause(rng.uniform(0, 0.4))
            if number % 2:
                os.kill(template_of(server), signal.SIGKILL)
                assert server.wait_exit() == 4, server.log
            else:
                crash(server)
            load.aim(None)
    sink.answers = [200]
    last = fronts.start()
    settle(last)
    wrong = complaints(last, load, fronts.ledger, sink, killed)
    assert not wrong, "\n".join(wrong)
    assert last.stop() == 0
    assert sum(s.is_accepted for s in load.sent) > 50
    assert any("worker_died" in (error or "") for (error,) in fronts.rows("error"))


# --- attempts


def has_ended(server: Server, address: str) -> dict[str, Any] | None:
    """Return a task that has ended; None also while the server cannot be asked."""
    try:
        task: dict[str, Any] = server.task(address)
    except (httpx.TransportError, AssertionError):
        return None
    return task if task["finished_at"] else None


def test_a_task_whose_front_is_killed_each_time_is_given_up(
    start_server: StartServer, sink: Sink, tmp_path: Path
) -> None:
    """After OGPU_MAX_ATTEMPTS it has failed as interrupted, and what waited behind it runs."""
    fronts = Fronts(
        start_server, tmp_path, OGPU_MAX_ATTEMPTS=2, OGPU_WORKERS=1, CALLBACK_URL=sink.url
    )
    server = fronts.start()
    server.post("waits_for_file", "unlucky", {"text": str(tmp_path / "never")})
    server.post("quick", "behind")
    for attempt in (1, 2):
        assert server.wait_state("unlucky", "running")["attempt"] == attempt
        wait_until(lambda n=attempt: fronts.runs()["unlucky"][-1:] == [n], "it runs")
        crash(server)
        server = fronts.start()
    error = server.wait_state("unlucky", "failed")["error"]
    assert error["reason"] == "interrupted"
    assert "OGPU_MAX_ATTEMPTS" in error["message"]
    server.wait_state("behind", "succeeded")
    assert fronts.runs() == {"unlucky": [1, 2], "behind": [1]}
    assert [d.address for d in sink.wait_for(1)] == ["behind"]


def test_a_task_that_kills_its_front_at_once_is_given_up(
    start_server: StartServer, tmp_path: Path
) -> None:
    """However soon it does that: one death may come before the disk knows that it ran, no more."""
    fronts = Fronts(start_server, tmp_path, OGPU_MAX_ATTEMPTS=2, OGPU_WORKERS=1)
    server = fronts.start()
    server.post("slow", "before", {"number": 0.5})
    assert server.post("kills_the_front", "poison").status_code == 202
    deaths = 0
    while deaths < 5:
        wait_until(
            lambda now=server: now.process.poll() is not None or has_ended(now, "poison"),
            "the front is dead, or the task given up",
        )
        if server.process.poll() is None:
            break
        deaths += 1
        server = fronts.start(wait=False)
    assert fronts.runs()["poison"] in ([1, 2], [1, 1, 2])
    assert server.wait_state("poison", "failed")["error"]["reason"] == "interrupted"


# --- the receiver


@pytest.mark.parametrize("trouble", ["down", "refusing", "hanging"])
def test_results_made_while_the_receiver_is_in_trouble_outlive_a_crash(
    start_server: StartServer, tmp_path: Path, trouble: str
) -> None:
    """They are delivered when both are back, with the ids of the first attempts."""
    with closing(socket.socket()) as place:  # bound, it refuses, and keeps the port for us
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
        url = f"http://127.0.0.1:{port}/callback"
        if trouble != "down":
            place.close()
            sink = Sink(answers=[503], port=port)
        if trouble == "hanging":
            sink.hold.clear()
        fronts = Fronts(start_server, tmp_path, CALLBACK_URL=url)
        server = fronts.start()
        addresses = [f"t{number}" for number in range(5)]
        for address in addresses:
            server.post("quick", address, {"text": address})
        if trouble == "hanging":  # the front dies with all of them under way
            sink.wait_for(len(addresses))
        else:
            wait_until(
                lambda: all(server.task(a)["callback"]["attempts"] for a in addresses),
                "an attempt of each has failed",
            )
        crash(server)
        server = fronts.start()
        addresses.append("late")
        server.post("quick", "late", {"text": "late"})
        for address in addresses:
            assert server.wait_state(address, "succeeded")["callback"]["state"] == "pending"
        place.close()
        if trouble == "down":
            sink = Sink(port=port)
    with closing(sink):
        sink.answers = [200]
        sink.hold.set()
        settle(server)
        assert {server.task(a)["callback"]["state"] for a in addresses} == {"delivered"}
        got = sorted({(d.address, d.json["address"], d.json["length"]) for d in sink.deliveries})
        assert got == sorted((a, a, len(a)) for a in addresses)
        assert len({d.headers["webhook-id"] for d in sink.deliveries}) == len(addresses)
        assert fronts.runs() == {address: [1] for address in addresses}
        assert server.stop() == 0


def test_an_id_is_not_given_again_when_its_task_is_forgotten(
    start_server: StartServer, sink: Sink, tmp_path: Path
) -> None:
    """Not even when all are: a receiver that knows the id takes a new result for an old one."""
    fronts = Fronts(start_server, tmp_path, CALLBACK_URL=sink.url, OGPU_TASK_TTL=0.01)
    server = fronts.start()
    server.run("quick", "one")
    sink.wait_for(1)
    assert server.stop() == 0
    server = fronts.start()
    wait_until(lambda: server.http.get("/tasks").json()["tasks"] == [], "all are forgotten")
    assert server.stop() == 0
    fronts.start().run("quick", "another")
    sink.wait_for(2)
    first, second = (delivery.headers["webhook-id"] for delivery in sink.deliveries)
    assert first != second


# --- a drain, and another source


@pytest.mark.parametrize("hurried", [False, True])
def test_a_drain_leaves_what_has_not_ended_to_the_next_start(
    start_server: StartServer, sink: Sink, tmp_path: Path, *, hurried: bool
) -> None:
    """It is queued in the journal, with its input, and runs in the order of its acceptance."""
    fronts = Fronts(
        start_server, tmp_path, CALLBACK_URL=sink.url, OGPU_DRAIN_TIMEOUT=60 if hurried else 1
    )
    server = fronts.start()
    now, later = tmp_path / "now", tmp_path / "later"
    for address, awaited in (("ends", now), ("outlasts", later)):
        server.post("waits_for_file", address, {"text": str(awaited)})
        wait_until(lambda a=address: a in fronts.runs(), "it runs")
    waiting = [f"waits{number}" for number in range(20)]
    for address in waiting:
        assert server.post("quick", address, {"text": address}).status_code == 202
    server.process.terminate()
    server.wait_log("draining")
    now.touch()
    sink.wait_for(1)
    if hurried:
        server.process.terminate()
    assert server.wait_exit() == 0
    assert fronts.rows("address, state, attempt") == [
        ("ends", "succeeded", 1), ("outlasts", "queued", 2), *((a, "queued", 1) for a in waiting),
    ]  # fmt: skip
    assert len(fronts.rows("number", "inputs")) == 1 + len(waiting)
    later.touch()
    server = fronts.start(OGPU_WORKERS=1)
    settle(server)
    order = [line.split()[0] for line in fronts.ledger.read_text().splitlines()]
    assert order == ["ends", "outlasts", "outlasts", *waiting]
    assert Counter(d.address for d in sink.deliveries) == Counter(["ends", "outlasts", *waiting])


_RENEWED = """
import ogpu.service
from pydantic import BaseModel
class Input(BaseModel):
    text: str
    voice: str
class Output(BaseModel):
    text: str = ""
@ogpu.service.expose()
def slow(data: Input) -> Output: return Output(text=data.text)
@ogpu.service.expose()
def quick(data: Output) -> Output: return data
ogpu.service.start()
"""


def test_what_the_next_source_cannot_run_fails_and_stops_nothing(
    start_server: StartServer, sink: Sink, tmp_path: Path
) -> None:
    """A function that is gone, an input that no longer fits: said so, for good; the rest runs."""
    fronts = Fronts(start_server, tmp_path, CALLBACK_URL=sink.url, OGPU_WORKERS=1)
    server = fronts.start()
    server.post("waits_for_file", "gone-running", {"text": str(tmp_path / "never")})
    server.wait_state("gone-running", "running")
    for function, address in (
        ("fails", "gone-queued"), ("slow", "misfit"), ("quick", "one"), ("slow", "misfit-too"),
        ("quick", "two"),
    ):  # fmt: skip
        assert server.post(function, address, {"text": address}).status_code == 202
    crash(server)
    server = fronts.start(_RENEWED)
    settle(server)
    for address, exception, why in (
        ("gone-running", "UnknownFunction", "does not expose `waits_for_file` any more"),
        ("gone-queued", "UnknownFunction", "does not expose `fails` any more"),
        ("misfit", "ValidationError", "does not fit the input model of `slow` any more: voice"),
        ("misfit-too", "ValidationError", "does not fit the input model of `slow` any more: voice"),
    ):
        error = server.wait_state(address, "failed")["error"]
        assert (error["reason"], error["exception"]) == ("exception", exception)
        assert why in error["message"]
    assert [d.json["text"] for d in sink.deliveries] == ["one", "two"]
    assert server.run("slow", "new", {"text": "a", "voice": "b"})["state"] == "succeeded"
    crash(server)
    server = fronts.start()  # the function is there again, and the task is over all the same
    assert server.task("gone-queued")["state"] == server.task("misfit")["state"] == "failed"
