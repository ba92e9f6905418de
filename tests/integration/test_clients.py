"""Clients that are slow or many cost the others nothing: raw sockets, a real server."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import StartServer
from support.raw_client import (
    CHUNKED,
    GIB,
    ORDINARY_S,
    connect,
    connections,
    has_answer,
    is_closed,
    read_answer,
    refusal,
    request,
    send_until_closed,
    took_s,
    waiting_request,
)
from support.waiting import wait_until


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Let this process open some thousand sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- time


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        b"GET /healthz HTTP/1.1\r\nho",
        request("a", b"x" * 9999)[:-9999],
        CHUNKED + b"fff\r\n",
    ],
    ids=["url", "header", "body", "chunk"],
)
def test_a_request_byte_by_byte_is_cut(start_server: StartServer, start: bytes) -> None:
    """408 after OGPU_REQUEST_TIMEOUT, however often another byte comes; nobody else waits."""
    server = start_server(OGPU_REQUEST_TIMEOUT=0.5)
    others = []
    with connect(server) as client:
        client.sendall(start)
        began = time.monotonic()
        while not has_answer(client, within_s=0.02):
            assert time.monotonic() - began < 0.5 + ORDINARY_S
            client.sendall(b"x")
            others.append(took_s(server, f"other{len(others)}"))
        assert time.monotonic() - began > 0.4
        answer = refusal(client, 408, "request-timeout")
    assert "OGPU_REQUEST_TIMEOUT" in answer.json["detail"]
    assert len(others) > 5
    assert statistics.median(others) < 0.05
    wait_until(lambda: connections(server) <= 1, "only our own connection is left")


def test_a_connection_of_blank_lines_is_closed(start_server: StartServer) -> None:
    """Blank lines before a request are allowed, and would make uvicorn forget its own timeout."""
    server = start_server(OGPU_REQUEST_TIMEOUT=0.5)
    with connect(server) as client:
        client.sendall(request("a"))
        assert read_answer(client).status == 200
        began = time.monotonic()
        while not has_answer(client, within_s=0.02):
            assert time.monotonic() - began < 0.5 + ORDINARY_S
            client.sendall(b"\r\n")
        assert is_closed(client)


@pytest.mark.parametrize("after", [0, 1], ids=["new", "after a request"])
def test_a_connection_that_sends_nothing_is_closed(start_server: StartServer, after: int) -> None:
    """Without a word; after a request it is uvicorn's keep-alive timeout (5 s) that does it."""
    server = start_server(OGPU_REQUEST_TIMEOUT=0.5)
    with connect(server) as client:
        for number in range(after):
            client.sendall(request(f"a{number}"))
            assert read_answer(client).status == 200
        began = time.monotonic()
        assert is_closed(client)
        assert time.monotonic() - began > 0.4


def test_a_body_that_nobody_reads_is_cut_as_well(start_server: StartServer) -> None:
    """A refused body, answered early, may come in until the time is over, and no longer."""
    server = start_server(OGPU_REQUEST_TIMEOUT=0.5)
    began = time.monotonic()
    with connect(server) as client:
        client.sendall(request("a", b"x" * 10_000_000, function="nope")[:100_000])
        assert read_answer(client).status == 404
        assert send_until_closed(client, b"x", GIB) < GIB
    assert time.monotonic() - began < 5
    wait_until(lambda: connections(server) <= 1, "only our own connection is left")


def test_an_early_answer_leaves_a_connection_that_works(start_server: StartServer) -> None:
    """And that is closed when it is not used, although uvicorn has forgotten to."""
    server = start_server(OGPU_REQUEST_TIMEOUT=0.5)
    whole = request("a", b"x" * 100_000, function="nope")
    with connect(server) as client:
        for number in range(2):
            client.sendall(whole[:1000])
            assert read_answer(client).status == 404
            client.sendall(whole[1000:])
            client.sendall(request(f"b{number}"))
            assert read_answer(client).status == 200
        client.sendall(whole[:1000])
        assert read_answer(client).status == 404
        client.sendall(whole[1000:])
        assert is_closed(client)


def test_the_time_of_the_answer_does_not_count(start_server: StartServer, tmp_path: Path) -> None:
    """A request that has arrived may run ten times as long, and those behind it wait for it."""
    server = start_server(OGPU_REQUEST_TIMEOUT=0.2)
    go = tmp_path / "go"
    half = request("second", b'{"text": "half"}')
    with connect(server) as client:
        client.sendall(waiting_request("first", go) + half[:-5])
        client.settimeout(2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(20)
        go.touch()
        assert read_answer(client).json["result"]["text"] == str(go)
        client.sendall(half[-5:])
        assert read_answer(client).json["result"]["text"] == "half"


def test_many_requests_on_one_connection(start_server: StartServer) -> None:
    """One after the other and pipelined; together they take longer than one request may."""
    server = start_server(OGPU_REQUEST_TIMEOUT=0.5)
    began = time.monotonic()
    with connect(server) as client:
        for number in range(5):
            body = json.dumps({"number": 0.15, "text": f"{number}"}).encode()
            client.sendall(request(f"single{number}", body, "sleep"))
            assert read_answer(client).json["result"]["text"] == f"{number}"
        client.sendall(
            b"".join(
                request(f"piped{n}", b'{"number": 0.15, "text": "%d"}' % n, "sleep")
                for n in range(5)
            )
        )
        for number in range(5):
            assert read_answer(client).json["result"]["text"] == f"{number}"
    assert time.monotonic() - began > 1.5


def test_a_large_body_in_many_pieces_arrives(start_server: StartServer) -> None:
    """8 MiB, with a length and in chunks, through a small OGPU_MAX_HEADER_BYTES."""
    server = start_server(OGPU_MAX_HEADER_BYTES=1024)
    text = "x" * (8 * 2**20)
    assert server.run("echo", "length", {"text": text})["result"]["text"] == text
    body = json.dumps({"text": text}).encode()
    pieces = (body[at : at + 50_000] for at in range(0, len(body), 50_000))
    response = server.http.post("/run/echo/chunks", content=pieces, headers={"prefer": "wait=30"})
    assert response.json()["result"]["text"] == text


# --- number


@pytest.mark.usefixtures("many_descriptors")
def test_a_thousand_idle_connections_cost_the_others_nothing(start_server: StartServer) -> None:
    server = start_server()
    alone = [took_s(server, f"alone{number}") for number in range(100)]
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connect(server))
        wait_until(lambda: connections(server) > 1000, "a thousand connections")
        beside = [took_s(server, f"beside{number}") for number in range(100)]
    assert statistics.median(beside) < 3 * statistics.median(alone) + 0.005
    wait_until(lambda: connections(server) <= 1, "their end")


def test_newcomers_are_served_and_who_waited_longest_goes(start_server: StartServer) -> None:
    """However many sit there; one log line a second at most tells of it."""
    server = start_server(OGPU_MAX_CONNECTIONS=10)
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(3)]
        clients[0].sendall(request("oldest"))
        assert read_answer(clients[0]).status == 200  # it waits from now on, and not from before
        clients[1].sendall(b"GET /half")
        clients += [stack.enter_context(connect(server)) for _ in range(30)]
        for number, client in enumerate(clients[-9:]):
            client.sendall(request(f"new{number}"))
            assert read_answer(client).status == 200
        refusal(clients[1], 503, "too-many-connections")
        assert all(is_closed(client) for client in (clients[0], *clients[2:-10]))
        wait_until(lambda: connections(server) <= 10, "no more connections than allowed")
    assert took_s(server, "after") < ORDINARY_S
    assert 1 <= server.log.count("OGPU_MAX_CONNECTIONS") <= 5


def test_where_every_connection_is_busy_a_newcomer_gets_503(
    start_server: StartServer, tmp_path: Path
) -> None:
    """With Retry-After; after one of the tasks has ended, the next one is served."""
    server = start_server(OGPU_MAX_CONNECTIONS=3, OGPU_WORKERS=3)
    files = [tmp_path / f"go{number}" for number in range(3)]
    with ExitStack() as stack:
        busy = [stack.enter_context(connect(server)) for _ in files]
        server.wait_log("Listening")
        for number, (client, file) in enumerate(zip(busy, files, strict=True)):
            client.sendall(waiting_request(f"busy{number}", file))
        for number in range(20):
            with connect(server) as newcomer:
                newcomer.sendall(request(f"refused{number}"))
                answer = refusal(newcomer, 503, "too-many-connections")
                assert int(answer.headers["retry-after"]) > 0
                assert "OGPU_MAX_CONNECTIONS" in answer.json["detail"]
        files[1].touch()
        assert read_answer(busy[1]).status == 200
        with connect(server) as newcomer:
            newcomer.sendall(request("served"))
            assert read_answer(newcomer).status == 200
        assert is_closed(busy[1])
        for index in (0, 2):
            files[index].touch()
            assert read_answer(busy[index]).status == 200
    assert server.log.count("OGPU_MAX_CONNECTIONS") <= 5
