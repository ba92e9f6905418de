"""Clients whose requests are endless or malformed cost the others nothing: raw sockets."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import StartServer
from support.raw_client import (
    CHUNKED,
    GIB,
    ORDINARY_S,
    RSS_LIMIT_BYTES,
    connect,
    connections,
    read_answer,
    refusal,
    request,
    rss_bytes,
    send_until_closed,
    took_s,
    waiting_request,
)
from support.waiting import wait_until

# --- heads


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /healthz HTTP/1.1\r\nhost: h\r\nendless: ", b"x" * 65_536),
        (b"GET /healthz HTTP/1.1\r\nhost: h\r\n", b"many: headers\r\n" * 4096),
        (b"GET /healthz HTTP/1.1\r\n", b"n" * 65_536),
        (b"GET /", b"u" * 65_536),
        (b"\r\n", b"\r\n" * 32_768),
        (CHUNKED + b"2;extension=", b"e" * 65_536),
        (CHUNKED + b"2\r\n{}\r\n0\r\nendless: ", b"trailer" * 8192),
    ],
    ids=["value", "headers", "name", "url", "blank lines", "chunk extension", "trailer"],
)
def test_an_endless_head_is_cut(start_server: StartServer, start: bytes, more: bytes) -> None:
    """A GiB of it costs the server no memory, and the client gets 431 as soon as it is too long."""
    server = start_server()
    took_s(server, "warm-up")
    before = rss_bytes(server)
    with connect(server) as client:
        client.sendall(start)
        assert send_until_closed(client, more, GIB) < 64 * 2**20
        answer = refusal(client, 431, "header-too-large")
    assert "OGPU_MAX_HEADER_BYTES" in answer.json["detail"]
    assert rss_bytes(server) - before < RSS_LIMIT_BYTES
    assert took_s(server, "after") < ORDINARY_S


def test_a_head_may_be_as_long_as_the_setting_says(start_server: StartServer) -> None:
    """To the byte, and each request anew; the body is not counted."""
    server = start_server(OGPU_MAX_HEADER_BYTES=1024)
    body = b'{"text": "%b"}' % (b"x" * 5000)
    shorter = len(request("a", headers="prefer: wait=30\r\nfill: \r\n", body=body)) - len(body)

    def filled(fill_bytes: int) -> bytes:
        return request("a", body, headers=f"prefer: wait=30\r\nfill: {'f' * fill_bytes}\r\n")

    with connect(server) as client:
        for _ in range(3):
            client.sendall(filled(1024 - shorter))
            assert read_answer(client).status == 200
        client.sendall(filled(1025 - shorter))
        refusal(client, 431, "header-too-large")


def test_a_long_head_waits_for_the_answers_before_it(
    start_server: StartServer, tmp_path: Path
) -> None:
    """What is refused behind a request that runs is answered after it, in the order of HTTP."""
    server = start_server()
    go = tmp_path / "go"
    for number, (junk, status, slug) in enumerate(
        ((b"GET /" + b"u" * 200_000, 431, "header-too-large"), (b"\0", 400, "bad-request"))
    ):
        with connect(server) as client:
            client.sendall(waiting_request(f"first{number}", go) + junk)
            server.wait_state(f"first{number}", "running")
            go.touch()
            assert read_answer(client).status == 200
            refusal(client, status, slug)
        go.unlink()


def test_pipelined_requests_of_a_client_that_left(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Their answers go nowhere; nothing is logged about it (the fixture looks), nothing is kept."""
    server = start_server(OGPU_MAX_CONNECTIONS=2)
    go = tmp_path / "go"
    for number in range(3):
        with connect(server) as client:
            client.sendall(waiting_request(f"first{number}", go) + request(f"second{number}"))
            server.wait_state(f"first{number}", "running")
        go.touch()
        server.wait_state(f"first{number}", "succeeded")
        go.unlink()
    wait_until(lambda: connections(server) <= 1, "only our own connection is left")


def test_what_is_no_http_is_400_as_problem_json(start_server: StartServer) -> None:
    server = start_server()
    for junk in (b"\x16\x03\x01\x02\0\x01", b"hello\r\n\r\n", CHUNKED + b"no length\r\n"):
        with connect(server) as client:
            client.sendall(junk)
            refusal(client, 400, "bad-request")
    assert took_s(server, "after") < ORDINARY_S
