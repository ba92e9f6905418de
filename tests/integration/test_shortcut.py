"""The short way to ``/run`` is not to be told from the long one: raw sockets.

A request goes the long way when it comes in two pieces; ``both_ways`` asks the same twice.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from conftest import StartServer
from support.raw_client import (
    Answer,
    connect,
    connections,
    has_answer,
    is_closed,
    read_answer,
    refusal,
    request,
    waiting_request,
)
from support.server import Server
from support.waiting import wait_until

KEY = "a key"


def both_ways(server: Server, data: bytes) -> list[Answer]:
    """Send a request whole, and byte by byte; the second has another address."""
    answers = []
    for way in ("whole", "pieces"):
        sent = data.replace(b"WAY", way.encode())
        with connect(server) as client:
            if way == "whole":
                client.sendall(sent)
            else:
                for at in range(len(sent)):
                    client.sendall(sent[at : at + 1])
            answers.append(read_answer(client))
    return answers


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (request("WAY"), 200),
        (request("WAY", headers=""), 202),
        (request("WAY", headers="prefer: wait=0\r\n"), 202),
        (request("WAY", b'{"text": 5}'), 422),
        (request("WAY", b"{"), 422),
        (request("WAY", b""), 422),
        (request("WAY!"), 422),
        (request(".."), 422),
        (request("WAY", function="nothing"), 404),
        (request("WAY", b'{"text": "%b"}' % (b"x" * 3000)), 413),
        (request("WAY?a=b"), 200),
        (request("%57AY"), 200),
    ],
)
def test_both_ways_answer_alike(start_server: StartServer, data: bytes, status: int) -> None:
    """Status, headers and body, but for the address and what a clock or a counter says."""
    server = start_server(OGPU_MAX_BODY_BYTES=1000)
    whole, pieces = both_ways(server, data)
    assert whole.status == pieces.status == status
    ignored = {"content-length", "date"}
    assert {k: v for k, v in whole.headers.items() if k not in ignored} == {
        k: v for k, v in pieces.headers.items() if k not in ignored
    }
    assert set(whole.headers) == set(pieces.headers)
    if status == 200:
        assert whole.json["result"] == pieces.json["result"]
        assert set(whole.json) == set(pieces.json)
    else:
        assert whole.body.replace(b"whole", b"pieces") == pieces.body


def test_the_key_is_asked_for(start_server: StartServer) -> None:
    server = start_server(OGPU_API_KEY=KEY)
    for header, status in (
        ("", 401),
        ("authorization: Bearer other\r\n", 401),
        (f"authorization: Bearer {KEY}\r\n", 202),
    ):
        whole, pieces = both_ways(server, request(f"WAY{status}", headers=header))
        assert whole.status == pieces.status == status


def test_no_more_is_accepted_while_draining(start_server: StartServer) -> None:
    server = start_server()
    server.http.post("/drain")
    whole, pieces = both_ways(server, request("WAY"))
    assert whole.status == pieces.status == 503
    assert whole.headers["retry-after"] == pieces.headers["retry-after"]


def test_the_same_task_is_joined(start_server: StartServer, tmp_path: Path) -> None:
    """A second request for a task that runs gets its result; with another input, 409."""
    server, go = start_server(), tmp_path / "go"
    with connect(server) as first, connect(server) as second, connect(server) as third:
        first.sendall(waiting_request("one", go))
        server.wait_state("one", "running")
        second.sendall(waiting_request("one", go))
        third.sendall(waiting_request("one", tmp_path / "other"))
        assert read_answer(third).status == 409
        assert not has_answer(second, 0.1)
        go.touch()
        assert read_answer(first).json["attempt"] == read_answer(second).json["attempt"] == 1


def test_a_body_that_arrives_later_is_waited_for(start_server: StartServer) -> None:
    """Cut anywhere, and with the next request right behind it; its time and size are limited."""
    server = start_server(OGPU_REQUEST_TIMEOUT=1, OGPU_MAX_BODY_BYTES=1_000_000)
    body = b'{"text": "%b"}' % (b"x" * 500_000)
    with connect(server) as client:
        for cut in (-1, -7, -499_999, -len(body)):
            whole = request(f"later{cut}", body)
            client.sendall(whole[:cut])
            assert not has_answer(client, 0.1)
            client.sendall(whole[cut:] + request(f"behind{cut}"))
            assert len(read_answer(client).json["result"]["text"]) == 500_000
            assert read_answer(client).json["task_address"] == f"behind{cut}"
        client.sendall(request("never", body)[:-1])
        refusal(client, 408, "request-timeout")
    with connect(server) as client:
        head, _, _ = request("large", b"{}").partition(b"\r\n\r\n")
        client.sendall(head.replace(b"length: 2", b"length: 1000001") + b"\r\n\r\n{")
        assert read_answer(client).status == 413


@pytest.mark.parametrize("piece", [1, 10_000])
def test_answers_come_in_the_order_of_the_requests(
    start_server: StartServer, tmp_path: Path, piece: int
) -> None:
    """What is sent before the first answer waits, however it is cut and whichever way it takes."""
    server, go = start_server(OGPU_WORKERS=2), tmp_path / "go"
    rest = (
        request("second")
        + b"GET /healthz HTTP/1.1\r\nhost: h\r\n\r\n"
        + request("third", headers="")
        + request("fourth", b"{")
    )
    with connect(server) as client:
        client.sendall(waiting_request("first", go))
        server.wait_state("first", "running")
        for at in range(0, len(rest), piece):
            client.sendall(rest[at : at + piece])
        assert not has_answer(client, 0.1)
        go.touch()
        assert read_answer(client).json["task_address"] == "first"
        assert read_answer(client).json["task_address"] == "second"
        assert read_answer(client).status == 200
        assert read_answer(client).json == {"task_address": "third", "status": "accepted"}
        assert read_answer(client).status == 422


def test_a_client_that_asks_again_and_again_without_reading_waits(
    start_server: StartServer,
) -> None:
    """Its answers do not pile up in the server: it is not heard until it has taken some."""
    server = start_server()
    text = b'{"text": "%b"}' % (b"x" * 50_000)
    sent = 0
    with connect(server, timeout_s=2) as client, contextlib.suppress(TimeoutError):
        for number in range(5000):
            client.sendall(request(f"deaf{number}", text))
            sent = number
    assert sent < 4000
    wait_until(lambda: connections(server) <= 1, 10)
    assert server.run("echo", "after")["state"] == "succeeded"


def test_a_client_that_leaves_is_forgotten_and_its_task_is_not(
    start_server: StartServer, tmp_path: Path
) -> None:
    server, go = start_server(), tmp_path / "go"
    with connect(server) as client:
        client.sendall(waiting_request("left", go))
        server.wait_state("left", "running")
    wait_until(lambda: connections(server) <= 1, 10)
    go.touch()
    server.wait_state("left", "succeeded")


def test_a_wait_that_is_over_is_answered_202(start_server: StartServer, tmp_path: Path) -> None:
    server, go = start_server(), tmp_path / "go"
    data = waiting_request("slow", go).replace(b"wait=60", b"wait=1")
    started = time.monotonic()
    with connect(server) as client:
        client.sendall(data)
        assert read_answer(client).json == {"task_address": "slow", "status": "accepted"}
    assert 1.0 <= time.monotonic() - started < 5
    go.touch()


def test_a_connection_that_rests_is_closed(start_server: StartServer) -> None:
    """uvicorn's five seconds begin with each answer, on both ways, and one timer is enough."""
    server = start_server()
    with connect(server) as client:
        for number in range(3):
            client.sendall(request(f"rests{number}"))
            assert read_answer(client).status == 200
            assert not has_answer(client, 1.0)
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: h\r\n\r\n")
        assert read_answer(client).status == 200
        client.sendall(request("last"))
        assert read_answer(client).status == 200
        started = time.monotonic()
        assert is_closed(client)
    assert 4.5 <= time.monotonic() - started < 8


def test_who_waits_while_the_service_stops_is_answered(
    start_server: StartServer, tmp_path: Path
) -> None:
    """202, since its task is kept for the next start; and the connection is closed."""
    server = start_server(OGPU_DRAIN_TIMEOUT=0.2)
    with connect(server) as client:
        client.sendall(waiting_request("kept", tmp_path / "never"))
        server.wait_state("kept", "running")
        server.stop()
        assert read_answer(client).json == {"task_address": "kept", "status": "accepted"}
        assert is_closed(client)
