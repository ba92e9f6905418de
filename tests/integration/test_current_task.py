"""current_task() in handlers: what it tells, and the progress that a handler reports."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from conftest import StartServer
from support.server import Server
from support.waiting import wait_until


def seconds(moment: str) -> float:
    """Read a time as the API writes it (fromisoformat of Python 3.10 knows no Z)."""
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()


def wait_progress(server: Server, address: str, message: str | None) -> dict[str, Any]:
    """Wait until a running task shows a progress of that message; return it."""

    def shown() -> dict[str, Any] | None:
        progress: dict[str, Any] | None = server.task(address)["progress"]
        return progress if progress and progress["message"] == message else None

    found = wait_until(shown, f"{address} says {message!r}", timeout_s=5)
    assert found is not None
    return found


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_handler_knows_its_task(start_server: StartServer, method: str) -> None:
    """Address, function, attempt, deadline (that of GET), and the time that is left."""
    server = start_server("talker.py", OGPU_START_METHOD=method)
    for function in ("tells", "tells_async"):
        task = server.run(function, f"0x{function}")
        assert task["state"] == "succeeded", task["error"]
        told = json.loads(task["result"]["text"])
        facts = (told["address"], told["function"], told["attempt"])
        assert facts == (f"0x{function}", function, 1)
        assert told["deadline"].endswith("+00:00")
        assert abs(told["deadline_s"] - seconds(task["deadline"])) < 0.001
        assert abs(told["remaining"] - (told["deadline_s"] - told["now_s"])) < 0.5
        assert 20 < told["remaining"] <= 30
        assert told["environment"] == told["subprocess"] == f"0x{function}"
    assert task["progress"] == {"fraction": 0.5, "message": "in a coroutine"}
    unlimited = json.loads(server.run("tells_unlimited", "b")["result"]["text"])
    assert (unlimited["deadline"], unlimited["remaining"]) == (None, None)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_outside_a_handler_there_is_no_task(start_server: StartServer, method: str) -> None:
    """At import and in @init: NoCurrentTaskError, which says what current_task() is for."""
    server = start_server("talker.py", OGPU_START_METHOD=method)
    outside = json.loads(server.run("tells_outside", "a")["result"]["text"])
    for place in ("import", "init"):
        assert outside[place].startswith("NoCurrentTaskError: no task runs here"), outside[place]
        assert "current_task() is for handlers" in outside[place]
    assert outside["address in @init"] == "not set"


def test_after_the_end_there_is_no_task(start_server: StartServer, tmp_path: Path) -> None:
    """A thread that a handler left behind finds neither the task nor its environment variable."""
    server = start_server("talker.py")
    found = tmp_path / "found"
    assert server.run("leaves_a_looker", "a", {"text": str(found)})["state"] == "succeeded"
    wait_until(found.exists, "both are gone", timeout_s=5)
    assert found.read_text() == "NoCurrentTaskError"


def test_a_flood_of_progress_is_cheap_and_its_last_word_is_kept(
    start_server: StartServer, tmp_path: Path
) -> None:
    """100,000 reports take moments, ten a second go out, and the last one is shown in the end.

    The handler falls silent after its last word, and the trailing report carries that still.
    """
    server = start_server("talker.py")
    count = 100_000
    go_on = str(tmp_path / "go")
    server.post("reports_often", "a", {"number": count, "go_on": go_on})
    wait_until(lambda: "all reported" in server.http.get("/tasks/a/logs").text, "all reported")
    last = {"fraction": 1.0, "message": f"step {count}"}
    assert wait_progress(server, "a", last["message"]) == last
    Path(go_on).touch()
    task = server.wait_state("a", "succeeded")
    assert task["progress"] == last
    assert task["result"]["number"] < 10, "each of them took more than 0.1 ms"


def test_the_last_word_before_the_end_is_kept(start_server: StartServer) -> None:
    """Also where the handler returns right after it, within the pause between two reports."""
    task = start_server("talker.py").run("reports_often", "a", {"number": 5})
    assert task["progress"] == {"fraction": 1.0, "message": "step 5"}


def test_progress_is_sent_ten_times_a_second_at_most(start_server: StartServer) -> None:
    """As current_task().progress() promises; counted by a watcher."""
    server = start_server("talker.py")
    server.post("reports_often", "a", {"number": 300_000})
    with server.http.stream("GET", "/tasks/a/events") as response:
        lines = list(response.iter_lines())
    took = server.task("a")["result"]["number"]
    reports = lines.count("event: progress")
    assert 2 <= reports <= took * 10 + 3, (reports, took)


OUTSIDE = [
    ("(-3, 'below')", {"fraction": 0.0, "message": "below"}),
    ("(7, 'above')", {"fraction": 1.0, "message": "above"}),
    ("(float('inf'), 'endless')", {"fraction": 1.0, "message": "endless"}),
    ("(True,)", {"fraction": 1.0, "message": None}),
    ("(0.5, 'x' * 5000)", {"fraction": 0.5, "message": "x" * 1000}),
    (r"(0.5, '\ud800\x00ü')", {"fraction": 0.5, "message": "\\ud800\x00ü"}),
    ("(10**400, 'huge')", {"fraction": 1.0, "message": "huge"}),
]


def test_what_lies_outside_is_taken_for_the_nearer_end(start_server: StartServer) -> None:
    """Fractions are clamped, however large; messages are cut, and made of what UTF-8 can say."""
    server = start_server("talker.py")
    for number, (arguments, shown) in enumerate(OUTSIDE):
        task = server.run("reports", f"t{number}", {"text": arguments})
        assert (task["result"]["text"], task["progress"]) == ("accepted", shown)


def test_what_is_no_number_is_an_error_of_the_handler(start_server: StartServer) -> None:
    """NaN, a text, None, and a message that is no text; nothing of it is shown."""
    server = start_server("talker.py")
    for number, (arguments, error) in enumerate(
        {
            "(float('nan'),)": "ValueError: progress() takes a number",
            "('0.5',)": "TypeError: progress() takes a number",
            "(None,)": "TypeError: progress() takes a number",
            "(1j,)": "TypeError: progress() takes a number",
            "(0.5, 7)": "TypeError: the message of progress() is a text",
        }.items()
    ):
        task = server.run("reports", f"t{number}", {"text": arguments})
        assert task["result"]["text"].startswith(error)
        assert task["progress"] is None


def test_any_thread_of_the_handler_may_report(start_server: StartServer) -> None:
    task = start_server("talker.py").run("reports_from_a_thread", "a")
    assert task["progress"] == {"fraction": 0.25, "message": "thread"}


def test_a_forked_child_reports_to_nobody(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("talker.py")
    server.post("reports_from_a_child", "a", {"go_on": str(tmp_path / "go")})
    wait_until(lambda: "the child is gone" in server.http.get("/tasks/a/logs").text, "child gone")
    assert server.task("a")["progress"] == {"fraction": 0.1, "message": "parent"}
    (tmp_path / "go").touch()
    task = server.wait_state("a", "succeeded")
    assert task["progress"] == {"fraction": 0.1, "message": "parent"}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_thread_that_goes_on_reporting_changes_no_other_task(
    start_server: StartServer, tmp_path: Path, method: str
) -> None:
    """Neither its own, which has ended, nor the next one, which the same worker runs."""
    server = start_server("talker.py", OGPU_START_METHOD=method)
    insisted = tmp_path / "insisted"
    ended = server.run("leaves_a_reporter", "a", {"text": str(insisted)})
    server.post("waits", "b", {"go_on": str(tmp_path / "go")})
    wait_until(insisted.exists, "the thread has reported many times while b runs")
    during = server.task("b")
    (tmp_path / "go").touch()
    after = server.wait_state("b", "succeeded")
    assert after["worker"] == ended["worker"]
    assert (during["state"], during["progress"]) == ("running", None)
    assert after["progress"] is None
    again = server.task("a")
    assert (again["state"], again["progress"]) == ("succeeded", ended["progress"])
