"""Accepted means kept: crashes of every part, at any moment, and what must be true afterwards.

The moments are random. A failure prints its seed; CHAOS_SEED=… makes the same choices again (the
processes' own timing is never the same).
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from conftest import StartServer
from support.crash_load import Load, complaints, settle
from support.fronts import Fronts, crash, pause
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until

_TEMPLATE = re.compile(r"template: pid (\d+)")


@pytest.fixture
def seed() -> int:
    number = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={number}")  # pytest shows it with a failure
    return number


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
        server.process.kill()
        if server.wait_exit() == 0:  # it was quicker, perhaps by less than a look can tell
            return "drained"
        assert server.process.returncode == -signal.SIGKILL, server.log
        return when
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
    return int(_TEMPLATE.findall(server.log)[-1])


def kill_template(server: Server) -> None:
    """Kill the template, and wait until the front has another one."""
    template = template_of(server)
    os.kill(template, signal.SIGKILL)
    wait_until(lambda: template_of(server) != template, "another template")


@pytest.mark.timeout(300)
def test_what_was_accepted_is_kept_whatever_is_killed(
    start_server: StartServer, sink: Sink, tmp_path: Path, seed: int
) -> None:
    """The template is replaced, its tasks run again; a worker's death is that of its task alone.

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
                kill_template(server)
                pause(rng.uniform(0, 0.4))
            crash(server)
            load.aim(None)
    sink.answers = [200]
    last = fronts.start()
    settle(last)
    wrong = complaints(last, load, fronts.ledger, sink, killed)
    assert not wrong, "\n".join(wrong)
    assert last.stop() == 0
    assert sum(s.is_accepted for s in load.sent) > 50
    assert any("worker_died" in (error or "") for (error,) in fronts.rows("details"))
