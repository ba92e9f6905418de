"""Accepted means kept: what the next start does with what an earlier one has left."""

from __future__ import annotations

import socket
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import StartServer
from support.crash_load import settle
from support.fronts import Fronts, crash
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until

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
    assert sorted(d.json["text"] for d in sink.deliveries) == ["one", "two"]
    assert server.run("slow", "new", {"text": "a", "voice": "b"})["state"] == "succeeded"
    crash(server)
    server = fronts.start()  # the function is there again, and the task is over all the same
    assert server.task("gone-queued")["state"] == server.task("misfit")["state"] == "failed"
