"""The outbox: signatures, failures, receivers in trouble, and what it costs the front."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from itertools import pairwise

import psutil
import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from conftest import StartServer
from support.server import Server
from support.sink import Sink
from support.waiting import wait_until

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"


def callback_of(server: Server, address: str) -> dict[str, object]:
    callback: dict[str, object] = server.task(address)["callback"]
    return callback


def wait_callback(server: Server, address: str, state: str, timeout_s: float = 20) -> None:
    wait_until(
        lambda: callback_of(server, address)["state"] == state,
        f"the callback of {address} is {state}",
        timeout_s,
    )


# --- what is sent


def test_a_secret_signs_as_in_standard_webhooks(start_server: StartServer, sink: Sink) -> None:
    """The `standardwebhooks` package, as a receiver would use it, verifies what arrives."""
    server = start_server(CALLBACK_URL=sink.url, OGPU_CALLBACK_SECRET=SECRET)
    server.post("echo", "a", {"text": "signed ü"})
    (delivery,) = sink.wait_for(1)
    assert Webhook(SECRET).verify(delivery.body, delivery.headers)["text"] == "signed ü"
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER_SECRET).verify(delivery.body, delivery.headers)


def test_two_secrets_sign_twice_while_one_replaces_the_other(
    start_server: StartServer, sink: Sink
) -> None:
    server = start_server(CALLBACK_URL=sink.url, OGPU_CALLBACK_SECRET=f"{SECRET} {OTHER_SECRET}")
    server.post("big", "a", {"number": 2_000_000})  # large enough to be signed in a thread
    (delivery,) = sink.wait_for(1)
    for secret in (SECRET, OTHER_SECRET):
        assert len(Webhook(secret).verify(delivery.body, delivery.headers)["text"]) == 2_000_000


def test_without_a_secret_nothing_is_signed(start_server: StartServer, sink: Sink) -> None:
    start_server(CALLBACK_URL=sink.url).post("echo", "a")
    (delivery,) = sink.wait_for(1)
    assert "webhook-signature" not in delivery.headers
    assert delivery.headers["webhook-id"].startswith("task_")


def test_failures_go_to_their_own_receiver(start_server: StartServer, sink: Sink) -> None:
    """With OGPU_FAILURE_CALLBACK_URL each end that is no success is told there, as a problem."""
    failures = Sink()
    try:
        server = start_server(
            CALLBACK_URL=sink.url,
            OGPU_FAILURE_CALLBACK_URL=failures.url + "/failed",
            OGPU_QUEUE_TIMEOUT=0.5,
            OGPU_CALLBACK_SECRET=SECRET,
        )
        server.post("raises", "raised", {"text": "no luck today"})
        server.post("hangs_asleep", "late")
        server.post("echo", "good")
        server.wait_state("good", "succeeded")
        server.post("unlimited_sleep", "cancelled", {"number": 60})
        server.wait_state("cancelled", "running")
        server.post("echo", "expired")
        server.wait_state("expired", "expired")
        server.http.delete("/tasks/cancelled")
        told = {d.address: d for d in failures.wait_for(4)}
        assert set(told) == {"raised", "late", "cancelled", "expired"}
        assert told["raised"].path == "/callback/failed/raised"
        assert told["raised"].headers["content-type"] == "application/problem+json"
        Webhook(SECRET).verify(told["raised"].body, told["raised"].headers)
        problem = told["raised"].json
        assert problem["type"] == "urn:ogpu:problem:task-failed"
        assert (problem["task_address"], problem["function"]) == ("raised", "raises")
        assert problem["error"]["reason"] == "exception"
        assert "no luck today" in problem["detail"]
        assert told["late"].json["type"] == "urn:ogpu:problem:task-timed-out"
        assert told["expired"].json["state"] == "expired"
        assert [d.address for d in sink.deliveries] == ["good"]
        wait_callback(server, "raised", "delivered")
    finally:
        failures.close()


def test_a_large_result_arrives_whole(start_server: StartServer, sink: Sink) -> None:
    """20 MB, also from the disk: the first attempt is refused."""
    sink.answers[:] = [500, 200]
    server = start_server(CALLBACK_URL=sink.url)
    server.post("big", "a", {"number": 20_000_000})
    first, second = sink.wait_for(2)
    assert first.body == second.body
    assert len(second.json["text"]) == 20_000_000


# --- receivers in trouble


def test_ten_errors_are_survived(start_server: StartServer, sink: Sink) -> None:
    """A receiver that answers 500 ten times gets it at the eleventh, within half a minute."""
    sink.answers[:] = [500] * 10 + [200]
    server = start_server(CALLBACK_URL=sink.url)
    server.post("echo", "a")
    deliveries = sink.wait_for(11, timeout_s=40)
    assert len({d.headers["webhook-id"] for d in deliveries}) == 1
    wait_callback(server, "a", "delivered")
    assert callback_of(server, "a") == {
        "state": "delivered",
        "attempts": 11,
        "last_error": None,
    }


def test_a_receiver_that_comes_back_gets_everything(start_server: StartServer) -> None:
    """Nobody listens while the results are made; then somebody does, on the same port."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    server = start_server(CALLBACK_URL=f"http://127.0.0.1:{port}/callback")
    for number in range(20):
        assert server.run("echo", f"t{number}", {"text": str(number)})["state"] == "succeeded"
    wait_until(lambda: int(str(callback_of(server, "t0")["attempts"])) >= 2, "tried")
    assert "Cannot connect" in str(callback_of(server, "t0")["last_error"])
    sink = Sink(port=port)
    try:
        sink.wait_for(20)
        assert {(d.address, d.json["text"]) for d in sink.deliveries} == {
            (f"t{n}", str(n)) for n in range(20)
        }
    finally:
        sink.close()


def test_a_receiver_that_hangs_on_some_delays_no_other(
    start_server: StartServer, sink: Sink
) -> None:
    """Forty deliveries that hang, more than are retried at once, leave the way free."""
    go_on = threading.Event()
    sink.on_delivery = lambda d: go_on.wait(30) if d.address.startswith("hung") else None
    server = start_server(CALLBACK_URL=sink.url, OGPU_CALLBACK_TIMEOUT=1)
    try:
        for number in range(40):
            server.run("echo", f"hung{number}")
        wait_until(
            lambda: int(str(callback_of(server, "hung39")["attempts"])) >= 1, "all hang once"
        )
        started = time.monotonic()
        for number in range(40):
            server.run("echo", f"new{number}")
            wait_callback(server, f"new{number}", "delivered")
        assert time.monotonic() - started < 10
    finally:
        go_on.set()
    for number in range(40):
        wait_callback(server, f"hung{number}", "delivered")


def test_a_failure_receiver_in_trouble_does_not_hold_up_results(
    start_server: StartServer, sink: Sink
) -> None:
    failures = Sink()
    failures.hold.clear()
    try:
        server = start_server(CALLBACK_URL=sink.url, OGPU_FAILURE_CALLBACK_URL=failures.url)
        for number in range(60):
            server.run("raises", f"f{number}")
        server.post("echo", "good")
        sink.wait_for(1, timeout_s=5)
    finally:
        failures.close()


def test_retries_wait_longer_and_longer(start_server: StartServer, sink: Sink) -> None:
    times: list[float] = []
    sink.on_delivery = lambda _: times.append(time.monotonic())
    sink.answers[:] = [503]
    start_server(CALLBACK_URL=sink.url).post("echo", "a")
    sink.wait_for(7)
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert waits[0] < 0.5
    assert sum(waits[3:]) > sum(waits[:3])


def test_undelivered_results_cost_the_front_no_memory(
    start_server: StartServer, sink: Sink
) -> None:
    """A receiver that hangs, and 300 results of 1 MB: at most a few of them are in memory."""
    sink.hold.clear()
    server = start_server(CALLBACK_URL=sink.url, OGPU_CALLBACK_TIMEOUT=60)
    front = psutil.Process(server.process.pid)
    server.run("big", "first", {"number": 1_000_000})
    before = front.memory_info().rss
    for number in range(300):
        server.run("big", f"t{number}", {"number": 1_000_000})
    grown = front.memory_info().rss - before
    assert grown < 100_000_000, f"{grown / 1e6:.0f} MB"
    sink.hold.set()
    sink.wait_for(301, timeout_s=40)
    assert Counter(d.address for d in sink.deliveries).most_common(1)[0][1] == 1


def test_410_is_the_end_of_it_and_another_post_is_a_new_run(
    start_server: StartServer, sink: Sink
) -> None:
    """Once a callback is given up the task is over: its address is free."""
    sink.answers[:] = [410, 200]
    server = start_server(CALLBACK_URL=sink.url)
    server.post("echo", "a", {"text": "first"})
    wait_callback(server, "a", "given_up")
    assert server.post("echo", "a", {"text": "second"}).status_code == 202
    first, second = sink.wait_for(2)
    assert first.headers["webhook-id"] != second.headers["webhook-id"]
    assert second.json["text"] == "second"


# --- while a callback is pending


def test_a_post_joins_a_task_whose_callback_is_pending(
    start_server: StartServer, sink: Sink
) -> None:
    """It is active: the same input is answered 202 and not run, another one 409, over a restart."""
    sink.answers[:] = [500]
    settings = {"CALLBACK_URL": sink.url}
    server = start_server(**settings)
    server.run("echo", "a", {"text": "x"})
    sink.wait_for(1)
    done = server.slot()["tasks_done"]
    assert server.post("echo", "a", {"text": "x"}).status_code == 202
    conflict = server.post("echo", "a", {"text": "y"})
    assert conflict.status_code == 409
    assert "callback" in conflict.json()["detail"]
    assert server.slot()["tasks_done"] == done
    waited = server.run("echo", "a", {"text": "x"})
    assert (waited["state"], waited["callback"]["state"]) == ("succeeded", "pending")
