"""A client on a raw socket: it sends what it likes, and reads one answer at a time."""

from __future__ import annotations

import json
import select
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .server import Server

GIB = 2**30
RSS_LIMIT_BYTES = 20 * 2**20
CHUNKED = b"POST /run/echo/a HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"
ORDINARY_S = 1.0  # far more than a small task takes, far less than any limit that is not shortened


@dataclass(frozen=True)
class Answer:
    """A response, as it came over the socket."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def connect(server: Server, timeout_s: float = 20) -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=timeout_s)


def request(
    address: str, body: bytes = b"{}", function: str = "echo", headers: str = "prefer: wait=30\r\n"
) -> bytes:
    head = f"POST /run/{function}/{address} HTTP/1.1\r\nhost: h\r\n{headers}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def waiting_request(address: str, file: Path) -> bytes:
    """Return a request that is being answered until the file is there."""
    body = json.dumps({"text": str(file)}).encode()
    return request(address, body, "waits_for_file", "prefer: wait=60\r\n")


def read_answer(client: socket.socket) -> Answer:
    """Read one response, and no byte more."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = client.recv(1)
        assert byte, f"closed after {head!r}"
        head += byte
    first, *lines = head.decode().split("\r\n")[:-2]
    headers = dict(line.lower().split(": ", 1) for line in lines)
    body = b""
    while len(body) < int(headers["content-length"]):
        body += client.recv(int(headers["content-length"]) - len(body))
    return Answer(int(first.split()[1]), headers, body)


def refusal(client: socket.socket, status: int, slug: str) -> Answer:
    """Read a response that refuses the request and ends the connection."""
    answer = read_answer(client)
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["connection"] == "close"
    assert set(answer.json) == {"type", "title", "status", "detail"}
    assert answer.json["type"] == f"urn:ogpu:problem:{slug}"
    assert answer.json["status"] == status
    assert is_closed(client), "it is still open"
    return answer


def has_answer(client: socket.socket, within_s: float) -> bool:
    """Tell whether the server has answered, or closed the connection."""
    return bool(select.select([client], [], [], within_s)[0])


def is_closed(client: socket.socket) -> bool:
    """Wait for the end of the connection; what arrives instead is an error."""
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


def send_until_closed(client: socket.socket, data: bytes, limit_bytes: int) -> int:
    """Send the same again and again until the server hangs up, and return how much was sent."""
    sent = 0
    while sent < limit_bytes:
        try:
            sent += client.send(data)
        except ConnectionError:
            break
    return sent


def rss_bytes(server: Server) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


def connections(server: Server) -> int:
    """Count the server's connections by its descriptors, as nothing else tells it."""
    found = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(one.status != psutil.CONN_LISTEN for one in found)


def took_s(server: Server, address: str) -> float:
    """Run a small task on an open connection and return how long that took."""
    started = time.monotonic()
    assert server.run("echo", address)["state"] == "succeeded"
    return time.monotonic() - started
