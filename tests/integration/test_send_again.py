"""The callback once more, and which task a call means."""

from __future__ import annotations

from pathlib import Path

from conftest import StartServer
from support.sink import Sink
from support.waiting import wait_until


def test_the_callback_can_be_sent_again(start_server: StartServer, sink: Sink) -> None:
    """With the same webhook-id and body; failures too where they have a receiver."""
    server = start_server(CALLBACK_URL=sink.url, OGPU_FAILURE_CALLBACK_URL=f"{sink.url}/failed")
    for count, (function, address) in enumerate((("echo", "good"), ("raises", "bad"))):
        server.run(function, address)
        wait_until(lambda a=address: server.task(a)["callback"]["state"] == "delivered", "told")
        response = server.http.post(f"/tasks/{address}/callback")
        assert response.status_code == 202
        assert response.json()["task_address"] == address
        first, second = sink.wait_for(2 * count + 2)[2 * count :]
        assert (first.path, first.body) == (second.path, second.body)
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        wait_until(lambda a=address: server.task(a)["callback"]["state"] == "delivered", "again")
    server.post("unlimited_sleep", "busy", {"number": 60})
    refused = server.http.post("/tasks/busy/callback")
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:ogpu:problem:not-ended")
    assert server.http.post("/tasks/nobody/callback").status_code == 404


def test_a_callback_is_sent_again_after_it_was_given_up(
    start_server: StartServer, sink: Sink, tmp_path: Path
) -> None:
    """Also by the next start, which only has the journal to know the task by."""
    sink.answers[:] = [410, 200]
    server = start_server(CALLBACK_URL=sink.url, OGPU_STATE_DIR=tmp_path / "kept")
    server.run("echo", "a")
    wait_until(lambda: server.task("a")["callback"]["state"] == "given_up", "given up")
    assert server.stop() == 0
    again = start_server(CALLBACK_URL=sink.url, OGPU_STATE_DIR=tmp_path / "kept")
    assert again.http.post("/tasks/a/callback").status_code == 202
    first, second = sink.wait_for(2)
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    wait_until(lambda: again.task("a")["callback"]["state"] == "delivered", "delivered")
    assert again.task("a")["callback"] == {"state": "delivered", "attempts": 1, "last_error": None}


def test_while_a_callback_is_sent_again_the_same_task_is_no_conflict(
    start_server: StartServer, sink: Sink
) -> None:
    """409 says that the input is another one, and here it is the same."""
    server = start_server(CALLBACK_URL=sink.url)
    server.run("echo", "a", {"text": "x"})
    wait_until(lambda: server.task("a")["callback"]["state"] == "delivered", "delivered")
    sink.hold.clear()
    assert server.http.post("/tasks/a/callback").json()["callback"]["state"] == "pending"
    again = server.post("echo", "a", {"text": "x"})
    assert again.status_code == 202, again.text


def test_without_a_receiver_no_callback_can_be_sent(start_server: StartServer, sink: Sink) -> None:
    """409 where nobody is set: for anything, or for failures alone."""
    server = start_server()
    server.run("echo", "a")
    refused = server.http.post("/tasks/a/callback")
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:ogpu:problem:no-receiver")
    other = start_server(CALLBACK_URL=sink.url)
    other.run("raises", "a")
    assert other.http.post("/tasks/a/callback").status_code == 409
    assert not sink.deliveries


def test_function_chooses_where_an_address_serves_several(
    start_server: StartServer, sink: Sink
) -> None:
    """For every call below /tasks/{task_address}: without it 409, which names the functions."""
    server = start_server(CALLBACK_URL=sink.url)
    server.run("speaks", "a")
    server.run("echo", "a")
    server.post("unlimited_sleep", "a", {"number": 60})
    calls = [
        ("GET", ""),
        ("GET", "/logs"),
        ("GET", "/events"),
        ("POST", "/callback"),
        ("DELETE", ""),
    ]
    for method, tail in calls:
        path = f"/tasks/a{tail}"
        ambiguous = server.http.request(method, path)
        assert ambiguous.status_code == 409, path
        assert ambiguous.json()["type"] == "urn:ogpu:problem:ambiguous-task"
        assert "echo, speaks, unlimited_sleep" in ambiguous.json()["detail"]
        assert server.http.request(method, f"{path}?function=rich").status_code == 404
    assert server.http.get("/tasks/a?function=echo").json()["function"] == "echo"
    assert "from print" in server.http.get("/tasks/a/logs?function=speaks").text
    assert server.http.get("/tasks/a/logs?function=echo").text == ""
    assert "from print" in server.http.get("/tasks/a/events?function=speaks").text
    sink.wait_for(2)
    again = server.http.post("/tasks/a/callback?function=speaks")
    assert (again.status_code, again.json()["function"]) == (202, "speaks")
    sink.wait_for(3)
    assert server.http.delete("/tasks/a?function=speaks").status_code == 409
    cancelled = server.http.delete("/tasks/a?function=unlimited_sleep")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    assert server.http.get("/tasks/a?function=echo").json()["state"] == "succeeded"


def test_a_callback_is_sent_again_while_an_attempt_is_under_way(
    start_server: StartServer, sink: Sink
) -> None:
    """The old attempt, which ends in an error, does not undo what came of the new one."""
    sink.answers[:] = [500, 200]
    sink.hold.clear()
    server = start_server(CALLBACK_URL=sink.url)
    server.run("echo", "a")
    sink.wait_for(1)
    assert server.http.post("/tasks/a/callback").status_code == 202
    sink.hold.set()
    sink.wait_for(2, timeout_s=10)
    wait_until(lambda: server.task("a")["callback"]["state"] == "delivered", "delivered")
    assert len(sink.deliveries) == 2
