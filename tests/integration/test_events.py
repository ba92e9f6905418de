"""GET /tasks/{task_address}/events: what happens to a task, told to whoever watches."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from conftest import StartServer
from support.processes import open_descriptors
from support.server import Server
from support.waiting import wait_until

Event = tuple[str, dict[str, Any]]


def parse(lines: Iterable[str]) -> Iterator[Event]:
    """Read server-sent events (the WHATWG's rules, as far as this server uses them)."""
    kind, data = "message", ""
    for line in lines:
        if line == "":
            if data:
                yield kind, json.loads(data)
            kind, data = "message", ""
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                kind = value
            else:
                assert name == "data", line
                data += value


@contextmanager
def watching(server: Server, address: str) -> Iterator[Iterator[Event]]:
    """Open a stream of events; it must not be silent for longer than 15 s."""
    with httpx.stream("GET", f"{server.url}/tasks/{address}/events", timeout=15) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"
        yield parse(response.iter_lines())


def watch_without_reading(server: Server, address: str) -> socket.socket:
    """Ask for the events and read nothing, with little room for them on the way."""
    host, port = server.url.removeprefix("http://").split(":")
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.settimeout(15)
    lazy.connect((host, int(port)))
    head = f"GET /tasks/{address}/events HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    lazy.sendall(head.encode())
    return lazy


def watch(server: Server, address: str) -> list[Event]:
    """Return all events of a task, to the end of the stream."""
    with watching(server, address) as events:
        return list(events)


def states(events: Iterable[Event]) -> list[tuple[str, int]]:
    return [(data["state"], data["attempt"]) for kind, data in events if kind == "state"]


WHOLE = [
    ("state", "queued"),
    ("state", "running"),
    ("log", "first line"),
    ("progress", 0.5),
    ("log", "second line"),
    ("state", "succeeded"),
]


def brief(events: Iterable[Event]) -> list[tuple[str, object]]:
    """Keep what each event tells, without times and attempts."""
    return [(kind, d.get("state") or d.get("line") or d.get("fraction")) for kind, d in events]


def test_a_task_is_followed_from_the_queue_to_its_end(
    start_server: StartServer, tmp_path: Path
) -> None:
    """queued, running, lines and progress as they come, the end; then the stream ends by itself."""
    server = start_server("talker.py")
    server.post("waits", "before", {"go_on": str(tmp_path / "first")})
    server.post("speaks", "a", {"go_on": str(tmp_path / "second")})
    seen: list[Event] = []
    with watching(server, "a") as events:
        for event in events:
            seen.append(event)
            if event[1].get("state") == "queued":
                (tmp_path / "first").touch()
            if {"progress", "log"} <= {kind for kind, _ in seen}:  # live, and not at the end
                (tmp_path / "second").touch()
    # A line and a progress reach the front on ways of their own: either may be the first.
    assert sorted(map(str, brief(seen))) == sorted(map(str, WHOLE))
    assert [s for s, _ in states(seen)] == ["queued", "running", "succeeded"]
    assert brief(seen)[-2:] == WHOLE[-2:]
    assert ("progress", {"fraction": 0.5, "message": "half"}) in seen
    task = server.task("a")
    times = [data["at"] for kind, data in seen if kind == "state"]
    assert times == [task["accepted_at"], task["started_at"], task["finished_at"]]


def test_who_comes_late_first_gets_what_has_happened(
    start_server: StartServer, tmp_path: Path
) -> None:
    """While the task runs and after its end alike; the whole story is the same."""
    server = start_server("talker.py")
    server.post("speaks", "a", {"go_on": str(tmp_path / "go")})
    wait_until(
        lambda: server.task("a")["progress"] and "first" in server.http.get("/tasks/a/logs").text,
        "half way",
    )
    with watching(server, "a") as events:
        early = [next(events) for _ in range(4)]
        assert brief(early) == WHOLE[:4]
        (tmp_path / "go").touch()
        assert brief(events) == WHOLE[4:]
    after = watch(server, "a")
    assert sorted(map(str, brief(after))) == sorted(map(str, WHOLE))
    assert brief(after)[-1] == WHOLE[-1]


def test_every_end_is_told_and_ends_the_stream(start_server: StartServer, tmp_path: Path) -> None:
    """A failure, a timeout, and a cancel of a queued and of a running task."""
    server = start_server()
    server.run("raises", "raises")
    assert brief(watch(server, "raises"))[-1] == ("state", "failed")
    server.post("hangs_asleep", "timeout")
    assert states(watch(server, "timeout"))[-1] == ("timed_out", 1)
    server.post("unlimited_sleep", "running", {"number": 60})
    server.wait_state("running", "running")
    server.post("echo", "queued")
    with watching(server, "queued") as queued, watching(server, "running") as running:
        assert brief([next(queued)]) == [("state", "queued")]
        for address in ("queued", "running"):
            assert server.http.delete(f"/tasks/{address}").status_code == 200
        assert brief(queued) == [("state", "cancelled")]
        assert states(running) == [("queued", 1), ("running", 1), ("cancelled", 1)]


def test_several_watchers_see_the_same(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("talker.py")
    server.post("waits", "before", {"go_on": str(tmp_path / "go")})
    server.post("speaks", "a")
    opened = threading.Barrier(9)

    def follow() -> list[Event]:
        with watching(server, "a") as events:
            first = next(events)
            opened.wait(15)
            return [first, *events]

    with ThreadPoolExecutor(8) as pool:
        watchers = [pool.submit(follow) for _ in range(8)]
        opened.wait(15)
        (tmp_path / "go").touch()
        stories = [watcher.result(15) for watcher in watchers]
    assert sorted(map(str, brief(stories[0]))) == sorted(map(str, WHOLE))
    assert all(story == stories[0] for story in stories)


def test_an_unknown_or_ambiguous_task_has_no_stream(start_server: StartServer) -> None:
    server = start_server()
    assert server.http.get("/tasks/nobody/events").status_code == 404
    server.run("echo", "a")
    server.run("rich", "a")
    assert server.http.get("/tasks/a/events").status_code == 409


def test_a_watcher_that_goes_away_costs_nothing(start_server: StartServer, tmp_path: Path) -> None:
    """Neither a descriptor nor the task; also where it leaves at once."""
    server = start_server("talker.py")
    server.post("waits", "a", {"go_on": str(tmp_path / "go")})
    server.wait_state("a", "running")
    before = open_descriptors(server.process.pid)
    host, port = server.url.removeprefix("http://").split(":")
    for number in range(30):
        with watching(server, "a") as events:
            next(events)
            if number == 0:
                assert open_descriptors(server.process.pid) > before
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET /tasks/a/events HTTP/1.1\r\nhost: x\r\n\r\n")
    wait_until(lambda: open_descriptors(server.process.pid) <= before, "descriptors given back")
    (tmp_path / "go").touch()
    server.wait_state("a", "succeeded")


def test_a_watcher_that_never_reads_does_not_grow_the_front(start_server: StartServer) -> None:
    """It loses lines, is told how many, and still gets the end; others are served meanwhile.

    1,000 lines wait for a watcher at most, which is a bit more than a second of this flood: from
    then on the front grows no more, though 25 MB of lines are still to come.
    """
    server = start_server("talker.py", OGPU_WORKERS=2)
    wait_until(lambda: server.http.get("/readyz").json().get("ready_workers") == 2, "two workers")
    front = psutil.Process(server.process.pid)
    server.post("floods", "flood", {"number": 6})
    started = time.monotonic()
    server.wait_state("flood", "running")
    with watch_without_reading(server, "flood") as lazy:
        sizes: list[tuple[float, int]] = []
        while server.task("flood")["state"] == "running":
            other = f"other{len(sizes)}"
            assert server.run("tells_outside", other, wait_s=5)["state"] == "succeeded"
            sizes.append((time.monotonic() - started, front.memory_info().rss))
        full = next(size for at_s, size in sizes if at_s > 2.5)
        grown = sizes[-1][1] - full
        assert len(sizes) >= 50
        assert grown < 10 * 2**20, f"the front has grown by {grown:,} bytes"
        with lazy.makefile("rb") as stream:
            read = stream.read().decode()
    dropped = re.findall(r'event: dropped\r?\ndata: {"lines":(\d+)}', read)
    assert dropped
    assert int(dropped[0]) > 100
    assert '{"state":"succeeded"' in read


def test_a_task_that_is_queued_again_says_so(start_server: StartServer) -> None:
    """Its worker dies before it took the task: queued and running again, as attempt 2."""
    server = start_server("talker.py")
    pid = server.slot()["pid"]
    os.kill(pid, signal.SIGSTOP)
    server.post("speaks", "a")
    server.wait_state("a", "running")
    with watching(server, "a") as events:
        assert states([next(events), next(events)]) == [("queued", 1), ("running", 1)]
        os.kill(pid, signal.SIGKILL)
        assert states(events) == [("queued", 2), ("running", 2), ("succeeded", 2)]


def test_the_end_of_the_service_ends_the_streams(start_server: StartServer) -> None:
    """In order (a whole chunked body), soon, and with the word that the task waits again."""
    server = start_server(OGPU_DRAIN_TIMEOUT=0.3)
    server.post("unlimited_sleep", "a", {"number": 60})
    with watching(server, "a") as events:
        assert states([next(events), next(events)]) == [("queued", 1), ("running", 1)]
        server.process.send_signal(signal.SIGTERM)
        assert states(events) == [("queued", 2)]
    assert server.wait_exit(10) == 0
    assert "Traceback" not in server.log, server.log


def test_watchers_that_never_read_do_not_disturb_the_end(start_server: StartServer) -> None:
    """The service ends as soon as without them, and logs no traceback of its own doing."""
    server = start_server("talker.py", OGPU_DRAIN_TIMEOUT=0.2)
    server.post("floods", "flood", {"number": 60})
    server.wait_state("flood", "running")
    with watch_without_reading(server, "flood"):
        # With 1,500 lines of 8,000 characters the way to the watcher is full.
        wait_until(lambda: server.log.count("yyyy\n") > 1500, "much output", every_s=0.2)
        assert server.stop(10) == 0
    assert "Traceback" not in server.log
