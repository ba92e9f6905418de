"""A peer that answers before its handler has run: its results are waited for at a sink."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .candidate import Answer, Candidate
from .harness import HOST
from .peers.peer import Peer


class Sink(ThreadingHTTPServer):
    """Keeps the last result that was delivered for each task address."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((HOST, 0), _Delivery)
        self.come = threading.Condition()
        self.answers: dict[str, Answer] = {}

    def wait(self, address: str, limit_s: float) -> Answer | None:
        with self.come:
            self.come.wait_for(lambda: address in self.answers, limit_s)
            return self.answers.get(address)


class _Delivery(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        at, sink = time.time(), self.server
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
        assert isinstance(sink, Sink)
        with sink.come:
            sink.answers[self.path.rpartition("/")[2]] = Answer(at, json.loads(body), "called back")
            sink.come.notify_all()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its base's name
        """Say nothing."""


@dataclass(frozen=True, kw_only=True)
class CalledBack(Candidate):
    """It is asked as ever; what counts is what comes to the sink."""

    sink: Sink

    def exchange(self, data: Mapping[str, Any], limit_s: float) -> Answer | None:
        until = time.monotonic() + limit_s
        connection = self.server.connect()
        try:
            address = self.send(connection, data)
            connection.getresponse().read()
        finally:
            connection.close()
        return self.sink.wait(address, until - time.monotonic())

    def wait_until_answered(
        self, data: Mapping[str, Any], expected: Any = None, poll_s: float = 0.05
    ) -> Any:
        return self.wait_until_exchanged(data, expected, poll_s)


@contextmanager
def exchanging(
    peer: Peer, handlers: str, workers: int, variables: Mapping[str, str], *, torch: bool
) -> Iterator[Candidate]:
    """Serve a peer so that ``exchange`` gives its results, by whatever way they come."""
    if peer.answers:
        with peer.serve(handlers, workers, variables, torch=torch) as candidate:
            yield candidate
        return
    with Sink() as sink:
        threading.Thread(target=sink.serve_forever, daemon=True).start()
        called = {**variables, "CALLBACK_URL": f"http://{HOST}:{sink.server_port}/callback"}
        try:
            with peer.serve(handlers, workers, called, torch=torch) as candidate:
                given = {one.name: getattr(candidate, one.name) for one in fields(candidate)}
                yield CalledBack(**given, sink=sink)
        finally:
            sink.shutdown()
