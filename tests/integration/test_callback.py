"""The callback: what is sent, what counts as success, and that nothing waits for it."""

from __future__ import annotations

import socket
import time

import pytest

from conftest import StartServer
from support.sink import Sink
from support.waiting import wait_until


def test_a_result_reaches_the_callback(start_server: StartServer, sink: Sink) -> None:
    """POST {CALLBACK_URL}/{task_address}, the output model's JSON, as the frozen module did."""
    server = start_server(CALLBACK_URL=sink.url)
    server.post("echo", "0xabc", {"text": "hi"})
    (delivery,) = sink.wait_for(1)
    assert delivery.path == "/callback/0xabc"
    assert delivery.headers["content-type"] == "application/json"
    assert set(delivery.json) == {"text", "pid", "when", "number"}
    assert delivery.json["text"] == "hi"
    assert abs(int(delivery.headers["webhook-timestamp"]) - time.time()) < 60
    task = wait_until(
        lambda: (t := server.task("0xabc"))["callback"]["state"] == "delivered" and t, "delivered"
    )
    assert task["callback"] == {"state": "delivered", "attempts": 1, "last_error": None}


def test_nothing_is_sent_for_a_failure(start_server: StartServer, sink: Sink) -> None:
    server = start_server(CALLBACK_URL=sink.url)
    for function in ("raises", "returns_none", "exits_hard", "hangs_asleep"):
        server.run(function, function)
    server.run("echo", "good")
    sink.wait_for(1)
    assert [d.address for d in sink.deliveries] == ["good"]
    assert server.task("raises")["callback"]["state"] == "none"


@pytest.mark.parametrize("answer", [500, 404, 302, 429, 0])
def test_anything_but_2xx_is_tried_again(
    start_server: StartServer, sink: Sink, answer: int
) -> None:
    """Errors, redirects and broken connections; webhook-id and body are the same each time."""
    sink.answers[:] = [answer, answer, 204]
    sink.answer_headers["location"] = "/elsewhere"
    server = start_server(CALLBACK_URL=sink.url)
    server.post("echo", "a", {"text": "x"})
    deliveries = sink.wait_for(3)
    assert {d.path for d in deliveries} == {"/callback/a"}
    assert len({d.headers["webhook-id"] for d in deliveries}) == 1
    assert len({d.body for d in deliveries}) == 1
    wait_until(lambda: server.task("a")["callback"]["state"] == "delivered", "delivered")
    assert server.task("a")["callback"]["attempts"] == 3


def test_410_ends_the_tries(start_server: StartServer, sink: Sink) -> None:
    sink.answers[:] = [410]
    server = start_server(CALLBACK_URL=sink.url)
    server.post("echo", "a")
    wait_until(lambda: server.task("a")["callback"]["state"] == "given_up", "given up")
    assert server.task("a")["callback"]["attempts"] == 1
    assert "410" in server.task("a")["callback"]["last_error"]
    server.wait_log("[a] callback given up")


def test_retry_after_is_obeyed(start_server: StartServer, sink: Sink) -> None:
    sink.answers[:] = [503, 200]
    sink.answer_headers["retry-after"] = "2"
    server = start_server(CALLBACK_URL=sink.url)
    server.post("echo", "a")
    sink.wait_for(1)
    started = time.monotonic()
    sink.wait_for(2)
    assert time.monotonic() - started > 1.8


def test_a_receiver_that_hangs_holds_up_no_worker(start_server: StartServer, sink: Sink) -> None:
    """The worker is free the moment the result is stored; the attempt has a time limit."""
    sink.hold.clear()
    server = start_server(CALLBACK_URL=sink.url, OGPU_CALLBACK_TIMEOUT=0.5)
    for number in range(100):
        assert server.run("echo", f"t{number}")["state"] == "succeeded"
    wait_until(lambda: server.task("t0")["callback"]["last_error"], "the attempt timed out")
    sink.hold.set()
    wait_until(lambda: server.task("t99")["callback"]["state"] == "delivered", "delivered")
    wait_until(lambda: server.task("t0")["callback"]["state"] == "delivered", "delivered")


def test_a_receiver_that_is_not_there_harms_nobody(start_server: StartServer) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        server = start_server(CALLBACK_URL=url, OGPU_DRAIN_TIMEOUT=0.5, OGPU_STATE_DIR=":memory:")
        assert server.run("echo", "a")["state"] == "succeeded"
        wait_until(lambda: server.task("a")["callback"]["attempts"] >= 2, "tried again")
        assert server.slot()["state"] == "ready"
        assert server.stop() == 0
        assert "1 callback(s) are lost: they were not delivered" in server.log


def test_results_are_sent_once_each(start_server: StartServer, sink: Sink) -> None:
    server = start_server(CALLBACK_URL=sink.url, OGPU_WORKERS=2)
    for number in range(200):
        server.post("echo", f"t{number}", {"text": str(number)})
    sink.wait_for(200)
    assert server.stop() == 0
    assert len(sink.deliveries) == 200
    assert {(d.address, d.json["text"]) for d in sink.deliveries} == {
        (f"t{n}", str(n)) for n in range(200)
    }


def test_without_a_callback_url_one_line_says_so(start_server: StartServer) -> None:
    """One line at start, and none for a task; a variable that compose left empty is not set."""
    server = start_server(CALLBACK_URL="")
    for number in range(5):
        server.run("echo", f"t{number}")
    server.stop()
    assert server.log.count("CALLBACK_URL is not set") == 1
    after_settings = server.log.partition("Tasks are kept in")[2].partition("\n")[2]
    assert after_settings.lower().count("callback") == 1


def test_send_callback_still_works_for_sources_that_call_it(
    start_server: StartServer, sink: Sink
) -> None:
    source = """
import ogpu.service
from ogpu.service.server import send_callback
@ogpu.service.init()
def load(): send_callback("0xself", {"sent": "by hand"})
ogpu.service.start()
"""
    start_server(source, CALLBACK_URL=sink.url)
    (delivery,) = sink.wait_for(1)
    assert (delivery.path, delivery.json) == ("/callback/0xself", {"sent": "by hand"})
