"""A handler has its worker's channel to the front, and may do with it what it likes.

Whatever that is costs its own task and its own worker. Each attack has innocent tasks beside it,
and the front's answers and memory are watched (``support.neighbours``).
"""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from conftest import StartServer
from support.neighbours import is_whole, neighbours
from support.server import Server
from support.waiting import wait_until

GUILTY = "closed its channel to the service, or wrote garbage to it, and was killed"
MB = 10**6


@pytest.fixture
def server(start_server: StartServer) -> Server:
    """Three workers: for the guilty, for the innocent, and for one who waits through it all."""
    server = start_server("attacker.py", OGPU_WORKERS=3, OGPU_MAX_RESULT_BYTES=100 * MB)
    wait_until(lambda: is_whole(server), "three workers")
    return server


def names(server: Server, kind: str) -> list[str]:
    listed: list[str] = json.loads(server.run("names", "names", {"how": kind})["result"]["text"])
    return listed


def generations(server: Server) -> int:
    return sum(slot["generation"] for slot in server.workers()["workers"])


def test_garbage_costs_its_task_and_its_worker(server: Server, tmp_path: Path) -> None:
    """Lengths of 4 GiB, bytes that are no frame, and frames that no worker says."""
    go_on = tmp_path / "go on"
    server.post("waits", "sibling", {"text": str(go_on)})
    server.wait_state("sibling", "running")
    kinds = names(server, "garbage")
    for how in kinds:
        with neighbours(server, how):
            task = server.run("writes_garbage", "guilty", {"how": how})
            assert (task["state"], task["error"]["reason"]) == ("failed", "worker_died"), how
            assert GUILTY in task["error"]["message"], how
    assert generations(server) == 3 + len(kinds)
    go_on.touch()
    sibling = server.wait_state("sibling", "succeeded")
    assert (sibling["result"]["text"], sibling["attempt"]) == ("undisturbed", 1)


def test_death_in_the_middle_of_a_frame(server: Server) -> None:
    """In the lengths, between them and the header, in the header, in the payload."""
    for number in (3, 8, 20, 50_000):
        with neighbours(server, f"{number} bytes"):
            task = server.run("dies_in_a_frame", "guilty", {"number": number})
            assert (task["state"], task["error"]["reason"]) == ("failed", "worker_died")
            assert task["error"]["exit_code"] == 3


def test_words_that_come_at_the_wrong_time_change_nothing(server: Server) -> None:
    """Those of another run, of @init, too long ones: the task ends as it would have."""
    for how in names(server, "odd"):
        with neighbours(server, how):
            task = server.run("says", "odd", {"how": how})
            assert (task["state"], task["result"]) == ("succeeded", {"text": "own"}), how


def test_the_first_answer_to_an_order_is_its_answer(server: Server) -> None:
    """Though it came byte by byte, and was forged; the next orders get answers of their own."""
    for number in (1, 2):
        with neighbours(server, "its own answer"):
            task = server.run("answers_itself", "forger", {"number": number})
            assert (task["state"], task["result"]) == ("succeeded", {"text": "forged"})
    for text in "abcdef":  # the forger is among those who answer
        assert server.run("echo", "next", {"text": text})["result"] == {"text": text}
    assert generations(server) == 3


def test_a_channel_that_is_spoilt_costs_nobody_elses_task(server: Server) -> None:
    """Its worker ends or is ended; orders that it had not read yet are given to another one."""
    ends = {"non-blocking": "succeeded", "read": "succeeded", "write": "failed"}
    for number, (how, state) in enumerate(ends.items(), 1):
        with neighbours(server, how):
            assert server.run("spoils", "guilty", {"how": how})["state"] == state
            wait_until(lambda count=3 + number: generations(server) == count, "another worker")


def test_an_order_that_is_not_read_before_the_garbage_is_given_to_another(
    start_server: StartServer, tmp_path: Path
) -> None:
    """The worker is at fault for the task that it answered, and for no other."""
    server = start_server("attacker.py")
    go_on = tmp_path / "go on"
    server.post("answers_and_spoils", "guilty", {"text": str(go_on)})
    tasks = [f"innocent{number}" for number in range(5)]
    for address in tasks:
        assert server.post("echo", address, {"text": address}).status_code == 202
    go_on.touch()
    ends = [server.wait_state(address, "succeeded") for address in tasks]
    assert [end["result"]["text"] for end in ends] == tasks
    assert [end["attempt"] for end in ends] == [2, 1, 1, 1, 1]


def test_a_ready_with_anything_in_it_is_no_defect_of_the_service(
    start_server: StartServer,
) -> None:
    """The second worker's @init says so before it is ready: its slot is tried again."""
    source = """
import os, stat, ogpu.service
from pydantic import BaseModel
@ogpu.service.init()
def load() -> None:
    if os.path.exists("second"):
        for name in os.listdir("/proc/self/fd"):
            path = f"/proc/self/fd/{name}"
            if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
                header = b'["Ready", 3, [[1], {}], 0.5]'
                os.write(int(name), len(header).to_bytes(4, "big") + bytes(4) + header)
    open("second", "w").close()
@ogpu.service.expose()
def echo(data: BaseModel) -> BaseModel:
    return data
ogpu.service.start()
"""
    server = start_server(source, OGPU_WORKERS=2)
    wait_until(lambda: server.slot(1)["generation"] > 1, "another try")
    assert server.http.get("/readyz").status_code == 200


def test_an_answer_that_never_ends_is_ended_by_the_deadline(server: Server) -> None:
    """It may have been begun by the handler: what is read of it is bounded, and given back."""
    front = psutil.Process(server.process.pid)
    before = front.memory_info().rss
    with neighbours(server, "an unfinished frame", grows_bytes=130 * MB):
        input_ = {"number": 100 * MB, "text": "as a result"}
        task = server.run("begins_a_frame", "guilty", input_)
        assert task["state"] == "timed_out"
        wait_until(lambda: front.memory_info().rss < before + 20 * MB, "memory is given back")


def test_a_long_frame_that_says_nothing_is_refused_at_once(server: Server) -> None:
    """Its header is garbage, and what would follow it is not read."""
    with neighbours(server, "a frame that says nothing"):
        task = server.run("begins_a_frame", "guilty", {"number": 100 * MB})
        assert GUILTY in task["error"]["message"]


def test_a_frame_of_a_byte_more_than_a_result_may_have_is_refused_at_once(server: Server) -> None:
    with neighbours(server, "too long a frame"):
        task = server.run("begins_a_frame", "guilty", {"number": 102 * MB})
        assert GUILTY in task["error"]["message"]


def test_a_large_result_is_no_attack(server: Server) -> None:
    """90 MB come as they are; the front needs room for a few of them, and not for long."""
    with neighbours(server, "a large result", grows_bytes=400 * MB, slowest_s=3):
        server.post("big", "big", {"number": 90 * MB})
        with server.http.stream("GET", "/tasks/big/events") as events:
            assert '"succeeded"' in "".join(events.iter_text())
        with server.http.stream("GET", "/tasks/big") as answer:
            assert sum(map(len, answer.iter_raw())) > 90 * MB
